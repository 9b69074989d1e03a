//! Which tokens a prompt gets at its two ends.

use serde_json::Value;

/// Token ids before and after a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) before: Vec<u32>,
    pub(crate) after: Vec<u32>,
}

impl Ends {
    /// `ids` with these ends.
    pub(crate) fn around(&self, ids: &[u32]) -> Vec<u32> {
        [&self.before, ids, &self.after].concat()
    }

    /// What `tokenizer_config.json` asks for with `add_bos_token` and `add_eos_token`. Either key
    /// replaces the post-processor of `tokenizer.json`; without them it decides, which is `None`
    /// here. llama.cpp's converter reads the keys so, and so did transformers 4 for the models
    /// that have them; transformers 5 passes over them, and with them over DeepSeek's BOS.
    ///
    /// # Errors
    /// What is wrong with the configuration, as text.
    pub(crate) fn from_config(
        config: &Value,
        id_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<Option<Self>, String> {
        let flag = |key: &str| match &config[key] {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            other => Err(format!(
                "`{key}` is {other} in tokenizer_config.json, expected true or false"
            )),
        };
        let (add_bos, add_eos) = (flag("add_bos_token")?, flag("add_eos_token")?);
        if add_bos.is_none() && add_eos.is_none() {
            return Ok(None);
        }
        let ids = |add: Option<bool>, key: &str| match special_token(&config[key]) {
            Some(token) if add == Some(true) => id_of(token).map(|id| vec![id]).ok_or_else(|| {
                format!("`{key}` is `{token}` in tokenizer_config.json, but no token is spelled so")
            }),
            _ => Ok(Vec::new()),
        };
        Ok(Some(Self {
            before: ids(add_bos, "bos_token")?,
            after: ids(add_eos, "eos_token")?,
        }))
    }
}

/// A special token as `tokenizer_config.json` spells it: a string, or an object with `content`.
pub(crate) fn special_token(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn id_of(token: &str) -> Option<u32> {
        ["<s>", "</s>"]
            .iter()
            .position(|known| *known == token)
            .map(|id| id as u32)
    }

    #[test]
    fn flags_decide_only_when_they_are_there() {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        assert_eq!(Ends::from_config(&config, id_of), Ok(None));
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
            "add_bos_token": true});
        let ends = Ends::from_config(&config, id_of).unwrap().unwrap();
        assert_eq!(ends.around(&[7]), [0, 7]);
        let config = json!({"bos_token": null, "add_bos_token": true, "add_eos_token": false});
        let ends = Ends::from_config(&config, id_of).unwrap().unwrap();
        assert_eq!(ends, Ends::default());
    }

    #[test]
    fn a_token_that_is_not_there_and_a_flag_that_is_none_are_named() {
        let config = json!({"bos_token": "<b>", "add_bos_token": true});
        let error = Ends::from_config(&config, id_of).unwrap_err();
        assert!(error.contains("<b>"), "{error}");
        let config = json!({"add_eos_token": "yes"});
        let error = Ends::from_config(&config, id_of).unwrap_err();
        assert!(error.contains("add_eos_token"), "{error}");
    }
}
