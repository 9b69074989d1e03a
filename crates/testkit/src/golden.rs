//! Reading the reference files under `golden/`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::{Dtype, SafeTensors};

/// The `golden/` folder of the repository.
#[must_use]
pub fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden")
}

/// The tensors of one golden safetensors file.
#[derive(Debug)]
pub struct Golden {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    /// Opens `golden/NAME`, for example `qwen3_moe.safetensors`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn open(name: &str) -> Result<Self> {
        Self::at(&golden_dir().join(name))
    }

    /// Opens a golden file anywhere.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn at(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        SafeTensors::deserialize(&bytes).with_context(|| format!("parsing {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }

    /// Names of the tensors.
    ///
    /// # Errors
    /// None after a successful [`Golden::open`]; the signature leaves room for lazy reading.
    pub fn names(&self) -> Result<Vec<String>> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        Ok(tensors.names().into_iter().map(str::to_owned).collect())
    }

    /// Shape and values of an F32 tensor.
    ///
    /// # Errors
    /// There is none of this name and type.
    pub fn f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let (shape, bytes) = self.raw(name, Dtype::F32)?;
        Ok((
            shape,
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
        ))
    }

    /// Values of an I64 tensor that holds ids.
    ///
    /// # Errors
    /// There is none of this name and type, or a value does not fit `u32`.
    pub fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let (_, bytes) = self.raw(name, Dtype::I64)?;
        let ids = bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes));
        ids.map(|id| u32::try_from(id).with_context(|| format!("`{name}` holds {id}")))
            .collect()
    }

    fn raw(&self, name: &str, dtype: Dtype) -> Result<(Vec<usize>, Vec<u8>)> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        let Ok(view) = tensors.tensor(name) else {
            bail!(
                "{} has no tensor `{name}`; it has {:?}",
                self.path.display(),
                tensors.names()
            );
        };
        ensure!(
            view.dtype() == dtype,
            "`{name}` is {}, expected {dtype}",
            view.dtype()
        );
        Ok((view.shape().to_vec(), view.data().to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_floats_and_ids_and_names_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("g.safetensors");
        let floats: Vec<u8> = [1.5f32, -2.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let ids: Vec<u8> = [7i64, 9].iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = |dtype, data| safetensors::tensor::TensorView::new(dtype, vec![2], data);
        let tensors = [
            ("x", view(Dtype::F32, &floats).unwrap()),
            ("ids", view(Dtype::I64, &ids).unwrap()),
        ];
        let bytes = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(&path, bytes).unwrap();

        let golden = Golden::at(&path).unwrap();
        assert_eq!(golden.f32("x").unwrap(), (vec![2], vec![1.5, -2.0]));
        assert_eq!(golden.ids("ids").unwrap(), [7, 9]);
        assert!(golden.f32("y").unwrap_err().to_string().contains("`y`"));
        assert!(golden.f32("ids").is_err());
        assert_eq!(golden.names().unwrap().len(), 2);
    }
}
