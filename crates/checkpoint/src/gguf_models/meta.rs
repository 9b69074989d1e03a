//! The keys of one architecture: getters that put its name before them, and what tensors tell beside keys.

use crate::error::{CheckpointError, Result};
use crate::gguf::{Gguf, GgufTensor};
use crate::keys::MAX_SIZE;

/// Metadata of a file whose architecture is known.
pub(super) struct Meta<'a> {
    gguf: &'a Gguf,
    architecture: &'static str,
}

impl<'a> Meta<'a> {
    pub(super) fn new(gguf: &'a Gguf, architecture: &'static str) -> Self {
        Self { gguf, architecture }
    }

    /// The whole key: `block_count` is `llama.block_count`.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// A size that must be there.
    pub(super) fn size(&self, name: &str) -> Result<usize> {
        self.size_opt(name)?
            .ok_or_else(|| self.problem(name, "is missing"))
    }

    /// A size of at least 1; 0 is how converters spell "none".
    pub(super) fn size_opt(&self, name: &str) -> Result<Option<usize>> {
        self.bounded(name, self.gguf.size_opt(&self.key(name))?)
    }

    /// A size that may be one for all layers or one for each, which must agree.
    pub(super) fn uniform_size(&self, name: &str, n_layers: usize) -> Result<Option<usize>> {
        let Some(sizes) = self.gguf.sizes_per_layer(&self.key(name), n_layers)? else {
            return Ok(None);
        };
        if let Some(other) = sizes.iter().find(|size| **size != sizes[0]) {
            let problem = format!(
                "differs between layers ({} and {other}), which is not supported",
                sizes[0]
            );
            return Err(self.problem(name, problem));
        }
        self.bounded(name, sizes.first().copied())
    }

    /// A size for every block, which may be one for all; 0 is allowed.
    pub(super) fn sizes_per_block(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let n_blocks = self.size("block_count")?;
        let sizes = self.gguf.sizes_per_layer(&self.key(name), n_blocks)?;
        let Some(sizes) = sizes else {
            return Ok(None);
        };
        match sizes.iter().find(|size| **size > MAX_SIZE) {
            None => Ok(Some(sizes)),
            Some(size) => {
                Err(self.problem(name, format!("is {size}, expected at most {MAX_SIZE}")))
            }
        }
    }

    fn bounded(&self, name: &str, size: Option<usize>) -> Result<Option<usize>> {
        match size {
            Some(size) if size > MAX_SIZE => {
                Err(self.problem(name, format!("is {size}, expected at most {MAX_SIZE}")))
            }
            size => Ok(size.filter(|size| *size > 0)),
        }
    }

    /// A number that must be there.
    pub(super) fn number(&self, name: &str) -> Result<f64> {
        self.number_opt(name)?
            .ok_or_else(|| self.problem(name, "is missing"))
    }

    /// A number; those that files hold in 32 bits come as the shortest decimal that means the same 32 bits, which is
    /// what the configuration said that the file was made from.
    pub(super) fn number_opt(&self, name: &str) -> Result<Option<f64>> {
        let number = self.gguf.f32_opt(&self.key(name))?;
        Ok(number.map(decimal))
    }

    /// A number that converters leave out or set to 0 when it plays no part.
    pub(super) fn factor(&self, name: &str) -> Result<f64> {
        let number = self.number_opt(name)?;
        Ok(number.filter(|factor| *factor != 0.0).unwrap_or(1.0))
    }

    pub(super) fn flag_opt(&self, name: &str) -> Result<Option<bool>> {
        self.gguf.flag_opt(&self.key(name))
    }

    pub(super) fn text_opt(&self, name: &str) -> Result<Option<&'a str>> {
        self.gguf.text_opt(&self.key(name))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.gguf.value(&self.key(name)).is_some()
    }

    /// A key of the tokenizer that holds a token.
    pub(super) fn token(&self, name: &str) -> Result<Option<u32>> {
        self.gguf
            .u32_opt(&format!("tokenizer.ggml.{name}_token_id"))
    }

    pub(super) fn flags_per_layer(&self, name: &str, n: usize) -> Result<Option<Vec<bool>>> {
        self.gguf.flags_per_layer(&self.key(name), n)
    }

    /// A list of numbers.
    pub(super) fn i32s_opt(&self, name: &str) -> Result<Option<Vec<i32>>> {
        self.gguf.i32s_opt(&self.key(name))
    }

    pub(super) fn is_array(&self, name: &str) -> bool {
        let value = self.gguf.value(&self.key(name));
        value.is_some_and(|value| value.kind() == crate::gguf::ValueType::Array)
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&'a GgufTensor> {
        self.gguf.tensor(name)
    }

    /// The values of a small tensor.
    pub(super) fn values(&self, name: &str) -> Option<Vec<f64>> {
        let tensor = self.gguf.tensor(name)?;
        let values = tensor.dtype.decode(&tensor.bytes);
        Some(values.into_iter().map(decimal).collect())
    }

    pub(super) fn problem(&self, name: &str, problem: impl Into<String>) -> CheckpointError {
        self.gguf.key_error(&self.key(name), problem)
    }

    pub(super) fn unsupported(
        &self,
        name: &str,
        value: impl std::fmt::Display,
        reason: &str,
    ) -> CheckpointError {
        CheckpointError::Unsupported {
            file: self.gguf.origin().to_owned(),
            key: self.key(name),
            value: value.to_string(),
            reason: reason.to_owned(),
        }
    }

    pub(super) fn missing_tensor(&self, name: &str) -> CheckpointError {
        CheckpointError::MissingTensor {
            origin: self.gguf.origin().to_owned(),
            name: name.to_owned(),
            shape: Vec::new(),
            n_missing: 1,
        }
    }
}

/// The shortest decimal that reads back as `value`: 1e-6 for the 9.99999997e-7 that 32 bits hold of it.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_as_they_were_written() {
        for written in [1e-6, 1e6, 0.0625, 1.702, 2.5, 1e-5] {
            assert_eq!(decimal(written as f32), written);
        }
    }
}
