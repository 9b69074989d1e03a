//! Which number format every tensor gets, and the rules that change it, each with a reason to report.

use crate::Dtype;
use crate::error::{CheckpointError, Result};

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetDtype {
    /// Every tensor as it is stored, where the target can hold that.
    Keep,
    /// This format, where a tensor can have it.
    Is(Dtype),
}

impl TargetDtype {
    /// Parses `keep` or the name of a format in any case.
    ///
    /// # Errors
    /// An unknown format, or one that cannot be written; the text lists those that can.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        if text.eq_ignore_ascii_case("keep") {
            return Ok(Self::Keep);
        }
        let writable = Dtype::all().filter(|format| format.can_encode());
        match Dtype::from_name(text).filter(|format| format.can_encode()) {
            Some(format) => Ok(Self::Is(format)),
            None => {
                let names: Vec<String> = writable.map(|f| f.name().to_lowercase()).collect();
                Err(format!(
                    "`{text}` is no format that is written; known: keep, {}",
                    names.join(", ")
                ))
            }
        }
    }
}

/// A tensor's format and, where it is not what was asked for, why.
pub(super) struct Choice {
    pub(super) dtype: Dtype,
    pub(super) reason: Option<&'static str>,
}

/// The format of a tensor of a GGUF file. `stored` is what it has now; `wide` says that llama.cpp only reads it in f32.
pub(super) fn for_gguf(wanted: TargetDtype, stored: Dtype, shape: &[usize], wide: bool) -> Choice {
    let plain = |dtype| Choice {
        dtype,
        reason: None,
    };
    if wide {
        // Norms, biases, routers: everywhere f32, as every converter writes them.
        return plain(Dtype::F32);
    }
    let asked = match wanted {
        TargetDtype::Keep => stored,
        TargetDtype::Is(dtype) => dtype,
    };
    let cols = shape.last().copied().unwrap_or(1);
    if asked.gguf_id().is_none() {
        return Choice {
            dtype: Dtype::Bf16,
            reason: Some("GGUF has no 8-bit floats"),
        };
    }
    if cols.is_multiple_of(asked.block_len()) {
        return plain(asked);
    }
    // llama-quantize's: the next larger format with blocks of 32, or 16 bits.
    let smaller = match asked {
        Dtype::Q2K | Dtype::Q3K => Dtype::Q4_0,
        Dtype::Q4K => Dtype::Q5_0,
        Dtype::Q5K => Dtype::Q5_1,
        Dtype::Q6K => Dtype::Q8_0,
        Dtype::Iq4Xs => Dtype::Iq4Nl,
        _ => Dtype::F16,
    };
    if cols.is_multiple_of(smaller.block_len()) {
        return Choice {
            dtype: smaller,
            reason: Some("rows are no multiple of the format's block"),
        };
    }
    Choice {
        dtype: Dtype::F16,
        reason: Some("rows are no multiple of 32"),
    }
}

/// The format of a tensor of a folder.
pub(super) fn for_folder(wanted: TargetDtype, stored: Dtype) -> Choice {
    match wanted {
        TargetDtype::Is(dtype) => Choice {
            dtype,
            reason: None,
        },
        TargetDtype::Keep if stored.torch_name().is_some() => Choice {
            dtype: stored,
            reason: None,
        },
        TargetDtype::Keep => Choice {
            dtype: Dtype::Bf16,
            reason: Some("folders are written in plain formats"),
        },
    }
}

/// Refuses block formats for folders.
pub(super) fn check_folder(origin: &str, wanted: TargetDtype) -> Result<()> {
    match wanted {
        TargetDtype::Is(dtype) if dtype.torch_name().is_none() => {
            Err(CheckpointError::Unsupported {
                file: origin.to_owned(),
                key: "dtype".to_owned(),
                value: dtype.to_string(),
                reason: "a folder is written as keep, f32, f16 or bf16".to_owned(),
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit_fall_back_with_a_reason() {
        let of = |dtype, cols| {
            let choice = for_gguf(TargetDtype::Is(dtype), Dtype::F32, &[4, cols], false);
            (choice.dtype, choice.reason.is_some())
        };
        assert_eq!(of(Dtype::Q4K, 512), (Dtype::Q4K, false));
        assert_eq!(of(Dtype::Q4K, 96), (Dtype::Q5_0, true));
        assert_eq!(of(Dtype::Q5K, 96), (Dtype::Q5_1, true));
        assert_eq!(of(Dtype::Q6K, 96), (Dtype::Q8_0, true));
        assert_eq!(of(Dtype::Q6K, 40), (Dtype::F16, true));
        assert_eq!(of(Dtype::Q8_0, 40), (Dtype::F16, true));
        assert_eq!(of(Dtype::Bf16, 7), (Dtype::Bf16, false));
        let wide = for_gguf(TargetDtype::Is(Dtype::Q8_0), Dtype::Bf16, &[64], true);
        assert_eq!(wide.dtype, Dtype::F32);
    }

    #[test]
    fn names_are_parsed_and_unknown_ones_list_the_known() {
        assert_eq!(TargetDtype::parse("keep"), Ok(TargetDtype::Keep));
        assert_eq!(TargetDtype::parse("q4_k"), Ok(TargetDtype::Is(Dtype::Q4K)));
        for bad in ["q9", "u8", "q2_k"] {
            let error = TargetDtype::parse(bad).unwrap_err();
            assert!(error.contains("q8_0") && error.contains("bf16"), "{error}");
        }
    }
}
