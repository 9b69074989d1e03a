//! Metadata by key and type: every getter names the file and the key when the value is missing or of another type.

use super::value::{Array, Value};
use super::{Gguf, ValueType};
use crate::error::{CheckpointError, Result};
use crate::keys::MAX_LAYERS;

/// What a getter found instead of what it wanted.
type Found<T> = std::result::Result<T, String>;

impl Gguf {
    /// A text.
    ///
    /// # Errors
    /// The key is missing, or is no text.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.needed(key, self.text_opt(key)?)
    }

    /// [`Gguf::text`], if the key is there.
    ///
    /// # Errors
    /// It is no text.
    pub fn text_opt(&self, key: &str) -> Result<Option<&str>> {
        self.convert(key, |value| match value {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(unlike(value, "text")),
        })
    }

    /// A count: an integer of any width that is not negative.
    ///
    /// # Errors
    /// The key is missing, or is no such integer.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.needed(key, self.size_opt(key)?)
    }

    /// [`Gguf::size`], if the key is there.
    ///
    /// # Errors
    /// It is no such integer.
    pub fn size_opt(&self, key: &str) -> Result<Option<usize>> {
        self.convert(key, size)
    }

    /// An integer of any width that fits a `u32`: token ids and the like.
    ///
    /// # Errors
    /// The key is missing, or is no such integer.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.needed(key, self.u32_opt(key)?)
    }

    /// [`Gguf::u32`], if the key is there.
    ///
    /// # Errors
    /// It is no such integer.
    pub fn u32_opt(&self, key: &str) -> Result<Option<u32>> {
        self.convert(key, |value| {
            let fits = value.as_integer().and_then(|v| u32::try_from(v).ok());
            fits.ok_or_else(|| unlike(value, "an integer from 0 to 2^32 - 1"))
        })
    }

    /// A number of layers: positive and not absurd, since every layer costs memory before its tensors are seen.
    ///
    /// # Errors
    /// The key is missing, or is no such number.
    pub fn layers(&self, key: &str) -> Result<usize> {
        let n_layers = self.size(key)?;
        if !(1..=MAX_LAYERS).contains(&n_layers) {
            return Err(self.key_error(key, format!("is {n_layers}, expected 1 to {MAX_LAYERS}")));
        }
        Ok(n_layers)
    }

    /// A finite number.
    ///
    /// # Errors
    /// The key is missing, or is no number.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.needed(key, self.f32_opt(key)?)
    }

    /// [`Gguf::f32`], if the key is there.
    ///
    /// # Errors
    /// It is no number.
    pub fn f32_opt(&self, key: &str) -> Result<Option<f32>> {
        self.convert(key, number)
    }

    /// A flag.
    ///
    /// # Errors
    /// The key is missing, or is no flag.
    pub fn flag(&self, key: &str) -> Result<bool> {
        self.needed(key, self.flag_opt(key)?)
    }

    /// [`Gguf::flag`], if the key is there.
    ///
    /// # Errors
    /// It is no flag.
    pub fn flag_opt(&self, key: &str) -> Result<Option<bool>> {
        self.convert(key, flag)
    }

    /// An array of texts, not copied.
    ///
    /// # Errors
    /// The key is missing, is no such array, or an item is not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.needed(key, self.strings_opt(key)?)
    }

    /// [`Gguf::strings`], if the key is there.
    ///
    /// # Errors
    /// It is no such array, or an item is not UTF-8.
    pub fn strings_opt(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.convert(key, |value| array(value)?.texts())
    }

    /// An array of integers of any width that fit an `i32`: token types and the like.
    ///
    /// # Errors
    /// The key is missing, or is no such array.
    pub fn i32s(&self, key: &str) -> Result<Vec<i32>> {
        self.needed(key, self.i32s_opt(key)?)
    }

    /// [`Gguf::i32s`], if the key is there.
    ///
    /// # Errors
    /// It is no such array.
    pub fn i32s_opt(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let integer = |value: &Value| {
            let fits = value.as_integer().and_then(|v| i32::try_from(v).ok());
            fits.ok_or_else(|| unlike(value, "an integer of 32 bits"))
        };
        self.convert(key, |value| items(value, integer))
    }

    /// An array of finite numbers.
    ///
    /// # Errors
    /// The key is missing, or is no such array.
    pub fn f32s(&self, key: &str) -> Result<Vec<f32>> {
        self.needed(key, self.f32s_opt(key)?)
    }

    /// [`Gguf::f32s`], if the key is there.
    ///
    /// # Errors
    /// It is no such array.
    pub fn f32s_opt(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.convert(key, |value| items(value, number))
    }

    /// A count for each of `n_layers` layers: one for all of them, or an array with one for each.
    ///
    /// # Errors
    /// It is neither, or the array has another length.
    pub fn sizes_per_layer(&self, key: &str, n_layers: usize) -> Result<Option<Vec<usize>>> {
        self.convert(key, |value| per_layer(value, n_layers, size))
    }

    /// A number for each of `n_layers` layers, as [`Gguf::sizes_per_layer`].
    ///
    /// # Errors
    /// It is neither, or the array has another length.
    pub fn f32s_per_layer(&self, key: &str, n_layers: usize) -> Result<Option<Vec<f32>>> {
        self.convert(key, |value| per_layer(value, n_layers, number))
    }

    /// A flag for each of `n_layers` layers, as [`Gguf::sizes_per_layer`].
    ///
    /// # Errors
    /// It is neither, or the array has another length.
    pub fn flags_per_layer(&self, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>> {
        self.convert(key, |value| per_layer(value, n_layers, flag))
    }

    /// An error about a key of this file, for those who read meaning into it.
    #[must_use]
    pub fn key_error(&self, key: &str, problem: impl Into<String>) -> CheckpointError {
        CheckpointError::Key {
            file: self.origin.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    fn needed<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.key_error(key, "is missing"))
    }

    fn convert<'a, T>(
        &'a self,
        key: &str,
        convert: impl FnOnce(&'a Value) -> Found<T>,
    ) -> Result<Option<T>> {
        let converted = self.value(key).map(convert).transpose();
        converted.map_err(|problem| self.key_error(key, problem))
    }
}

fn unlike(value: &Value, wanted: &str) -> String {
    // The start of a text tells enough: some are whole templates.
    let shown: String = value.to_string().chars().take(60).collect();
    format!("is {shown} ({}), expected {wanted}", value.kind().name())
}

fn size(value: &Value) -> Found<usize> {
    let fits = value.as_integer().and_then(|v| usize::try_from(v).ok());
    fits.ok_or_else(|| unlike(value, "an integer that is not negative"))
}

fn number(value: &Value) -> Found<f32> {
    let fits = value.as_f64().map(|v| v as f32).filter(|v| v.is_finite());
    fits.ok_or_else(|| unlike(value, "a finite number"))
}

fn flag(value: &Value) -> Found<bool> {
    value
        .as_bool()
        .ok_or_else(|| unlike(value, "true or false (bool)"))
}

fn array(value: &Value) -> Found<&Array> {
    match value {
        Value::Array(array) => Ok(array),
        _ => Err(unlike(value, "an array")),
    }
}

fn items<T>(value: &Value, convert: impl Fn(&Value) -> Found<T>) -> Found<Vec<T>> {
    let item = |(at, item): (usize, Found<Value>)| {
        convert(&item?).map_err(|problem| format!("item {at} {problem}"))
    };
    array(value)?.iter().enumerate().map(item).collect()
}

fn per_layer<T: Clone>(
    value: &Value,
    n_layers: usize,
    convert: impl Fn(&Value) -> Found<T>,
) -> Found<Vec<T>> {
    // The number of layers comes from the file, too.
    if n_layers > MAX_LAYERS {
        return Err(format!(
            "is for {n_layers} layers, expected at most {MAX_LAYERS}"
        ));
    }
    let Value::Array(array) = value else {
        return Ok(vec![convert(value)?; n_layers]);
    };
    if array.len() != n_layers || array.item_type() == ValueType::Array {
        return Err(unlike(
            value,
            &format!("one value, or one for each of the {n_layers} layers"),
        ));
    }
    items(value, convert)
}
