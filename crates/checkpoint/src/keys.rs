//! Reading typed values out of one JSON file, with errors that name the file and the key.

use serde_json::{Map, Value, json};

use crate::Dtype;
use crate::error::{CheckpointError, Result};

/// The top level of one JSON file, with errors that name file and key. `null` counts as absent.
pub(crate) struct Keys {
    pub(crate) file: String,
    map: Map<String, Value>,
}

/// Largest size of anything; the product of two of them still fits.
pub(crate) const MAX_SIZE: usize = 1 << 31;

/// Most layers of a model; every layer costs memory before its tensors are seen. The deepest known has 126.
pub(crate) const MAX_LAYERS: usize = 1 << 12;

impl Keys {
    pub(crate) fn parse(file: String, text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|source| CheckpointError::Json {
            file: file.clone(),
            source,
        })?;
        match value {
            Value::Object(map) => Ok(Self { file, map }),
            _ => Err(CheckpointError::Key {
                file,
                key: "(top level)".to_owned(),
                problem: "is not an object".to_owned(),
            }),
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn problem(&self, key: &str, problem: String) -> CheckpointError {
        CheckpointError::Key {
            file: self.file.clone(),
            key: key.to_owned(),
            problem,
        }
    }

    pub(crate) fn unsupported(&self, key: &str, value: &Value, reason: &str) -> CheckpointError {
        CheckpointError::Unsupported {
            file: self.file.clone(),
            key: key.to_owned(),
            value: value.to_string(),
            reason: reason.to_owned(),
        }
    }

    fn need(&self, key: &str) -> Result<&Value> {
        self.get(key)
            .ok_or_else(|| self.problem(key, "is missing".to_owned()))
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self.need(key)?;
        value
            .as_str()
            .ok_or_else(|| self.problem(key, format!("is {value}, expected a string")))
    }

    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        let value = self.need(key)?;
        value
            .as_f64()
            .ok_or_else(|| self.problem(key, format!("is {value}, expected a number")))
    }

    fn as_size(&self, key: &str, value: &Value) -> Result<usize> {
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.filter(|size| (1..=MAX_SIZE).contains(size))
            .ok_or_else(|| {
                self.problem(
                    key,
                    format!("is {value}, expected an integer of 1 to {MAX_SIZE}"),
                )
            })
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.as_size(key, self.need(key)?)
    }

    /// A number of layers.
    pub(crate) fn layers(&self, key: &str) -> Result<usize> {
        let n_layers = self.size(key)?;
        if n_layers > MAX_LAYERS {
            let problem = format!("is {n_layers}, expected at most {MAX_LAYERS}");
            return Err(self.problem(key, problem));
        }
        Ok(n_layers)
    }

    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key)
            .map_or(Ok(default), |value| self.as_size(key, value))
    }

    /// As [`Keys::size_or`], where 0 is allowed too.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.size_or(key, default),
        }
    }

    /// A size under any of several spellings, the first being the usual one; those that are there must agree.
    pub(crate) fn size_of(&self, spellings: &[&str]) -> Result<usize> {
        let found = || {
            spellings
                .iter()
                .filter_map(|key| Some((*key, self.get(key)?)))
        };
        let Some((key, value)) = found().next() else {
            return self.size(spellings[0]);
        };
        match found().find(|(_, other)| *other != value) {
            Some((alias, other)) => {
                Err(self.problem(key, format!("is {value}, but `{alias}` is {other}")))
            }
            None => self.as_size(key, value),
        }
    }

    /// A size, or `None` when absent.
    pub(crate) fn size_maybe(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|value| self.as_size(key, value))
            .transpose()
    }

    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key).map_or(Ok(default), |_| self.number(key))
    }

    pub(crate) fn positive(&self, key: &str) -> Result<f64> {
        let value = self.number(key)?;
        if value.is_finite() && value > 0.0 {
            return Ok(value);
        }
        Err(self.problem(key, format!("is {value}, expected a positive number")))
    }

    /// An integer of 64 bits.
    pub(crate) fn whole(&self, key: &str) -> Result<u64> {
        let value = self.need(key)?;
        value
            .as_u64()
            .ok_or_else(|| self.problem(key, format!("is {value}, expected an integer from 0")))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        self.need(key)?;
        self.flag_or(key, false)
    }

    /// Refuses keys that are not `known`.
    pub(crate) fn refuse_others(&self, known: &[&str]) -> Result<()> {
        match self.map.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let problem = format!("is not known here; known: {}", known.join(", "));
                Err(self.problem(key, problem))
            }
        }
    }

    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let value = self.need(key)?;
        let numbers = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| self.problem(key, format!("is {value}, expected a list of numbers")))
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let read = |item: &Value| item.as_str().map(str::to_owned);
        let texts = value
            .as_array()
            .and_then(|items| items.iter().map(read).collect());
        let problem = || self.problem(key, format!("is {value}, expected a list of strings"));
        texts.map(Some).ok_or_else(problem)
    }

    /// The object under `key`, with errors that name it; `None` when absent.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: format!("{}: {key}", self.file),
                map: map.clone(),
            })),
            Some(value) => {
                Err(self.problem(key, format!("is {value}, expected an object or null")))
            }
        }
    }

    /// The object under `key` where there is one (multimodal wrappers), this one otherwise. What wrappers keep outside,
    /// although it is about the language model too, is taken along.
    pub(crate) fn inner(self, key: &str) -> Result<Self> {
        const OUTSIDE: [&str; 8] = [
            "model_type",
            "dtype",
            "torch_dtype",
            "quantization_config",
            "tie_word_embeddings",
            "eos_token_id",
            "bos_token_id",
            "pad_token_id",
        ];
        let Some(mut inner) = self.object(key)? else {
            return Ok(self);
        };
        for key in OUTSIDE {
            if let Some(value) = self.get(key)
                && inner.get(key).is_none()
            {
                inner.map.insert(key.to_owned(), value.clone());
            }
        }
        Ok(inner)
    }

    /// Fills in the keys of the object `defaults` that are absent. A `null` is there and stays.
    pub(crate) fn or_defaults(mut self, defaults: &Value) -> Self {
        let theta = |value: &Value| value.get("rope_theta").is_some();
        let nested = ["rope_parameters", "rope_scaling"];
        let has_theta = nested
            .iter()
            .any(|key| self.map.get(*key).is_some_and(theta));
        for (key, value) in defaults.as_object().into_iter().flatten() {
            if !(self.map.contains_key(key) || key == "rope_theta" && has_theta) {
                self.map.insert(key.clone(), value.clone());
            }
        }
        self
    }

    /// Refuses `key` unless it is absent or has one of the values that are implemented.
    pub(crate) fn only(&self, key: &str, allowed: &[Value], reason: &str) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => Err(self.unsupported(key, value, reason)),
            _ => Ok(()),
        }
    }

    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.problem(key, format!("is {value}, expected true or false")))
        })
    }

    pub(crate) fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let read = |item: &Value| item.as_u64().and_then(|size| usize::try_from(size).ok());
        let sizes = value
            .as_array()
            .and_then(|items| items.iter().map(read).collect());
        sizes.ok_or_else(|| self.problem(key, format!("is {value}, expected a list of integers")))
    }

    /// Token ids: absent, one integer, or a list.
    pub(crate) fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let read = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(read).collect(),
            single => read(single).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.problem(key, format!("is {value}, expected an id or a list of ids")))
    }

    pub(crate) fn dtype(&self) -> Result<Option<Dtype>> {
        let Some(key) = ["dtype", "torch_dtype"]
            .into_iter()
            .find(|key| self.get(key).is_some())
        else {
            return Ok(None);
        };
        let name = self.text(key)?;
        let all = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        match all
            .into_iter()
            .find(|dtype| dtype.torch_name() == Some(name))
        {
            Some(dtype) => Ok(Some(dtype)),
            None => {
                Err(self.unsupported(key, &json!(name), "supported: float32, float16, bfloat16"))
            }
        }
    }
}
