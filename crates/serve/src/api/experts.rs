//! The field `cadre` of requests and answers: how the choice of experts is changed, and which experts were picked.
//!
//! Requests carry a [`Steering`] in the JSON that `--steer` reads, name one that the server was started with, or bring one as a plan
//! with a scale; ask for a contrast with weaker experts; and say with `return_routing` whether the experts are told.
//! SGLang's `return_routed_experts` is understood, too, and answered as SGLang does: base64 of little-endian 32-bit ids,
//! `[tokens, layers with experts, top_k]`, -1 where a token has fewer.

use std::sync::Arc;

use cadre_engine::{Contrast, EngineError, Model, SessionOptions, SteerError, Steering};
use serde_json::{Map, Value, json};

use super::contrast::{self, Asked};
use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use super::plans;
use crate::schedule::Routed;
use crate::served::Served;

/// The field.
const NAME: &str = "cadre";
/// SGLang's fields.
const SGLANG: &str = "return_routed_experts";
const SGLANG_START: &str = "routed_experts_start_len";

/// Of which tokens the experts are told, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// As JSON: of the token before the answer and of those of the answer, the last of which is not read.
    Answer,
    /// As JSON: of the tokens of the prompt, too.
    All,
    /// As SGLang does, from this position.
    SgLang(usize),
}

impl Told {
    /// The first position that is told, after a prompt of so many tokens.
    pub(crate) fn from(self, n_prompt: usize) -> usize {
        match self {
            Self::Answer => n_prompt.saturating_sub(1),
            Self::All => 0,
            Self::SgLang(start) => start,
        }
    }
}

/// How a request's experts are picked and told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Experts {
    pub(crate) steering: Steering,
    /// What they are contrasted with, if they are.
    pub(crate) contrast: Option<Arc<Contrast>>,
    pub(crate) told: Option<Told>,
}

impl Experts {
    /// Reads the fields where nothing is told of experts.
    pub(crate) fn of_model(fields: &mut Fields, served: &Served) -> Result<Self> {
        let experts = Self::read(fields, served)?;
        if experts.contrast.is_some() {
            let problem = "is about how tokens are drawn, and none is drawn here";
            return Err(ApiError::field(contrast::NAME, problem).code("unsupported_parameter"));
        }
        match experts.told {
            None => Ok(experts),
            Some(_) => {
                let problem = "asks for the experts of tokens, which are not told here";
                Err(ApiError::field(NAME, problem).code("unsupported_parameter"))
            }
        }
    }

    /// Reads the fields, and checks them against the model.
    pub(crate) fn read(fields: &mut Fields, served: &Served) -> Result<Self> {
        let (mut steering, mut told, mut contrast) = (Steering::default(), None, None);
        match fields.take(NAME) {
            None => {}
            Some(Value::Object(mut map)) => {
                told = returned(map.remove("return_routing"))?;
                contrast = Asked::read(map.remove("contrast"))?;
                let plan = plans::read(map.remove("plan"), served)?;
                steering = plan.and(&parsed(NAME, map)?);
            }
            Some(other) => return Err(wrong(NAME, "an object", &other)),
        }
        if let Some(start) = sglang(fields)? {
            if told.is_some() {
                let problem = format!("goes not with `{NAME}.return_routing`; send one of them");
                return Err(ApiError::field(SGLANG, problem));
            }
            told = Some(Told::SgLang(start));
        }
        if told.is_some() && served.model.info().moe_layers.is_empty() {
            let problem = "asks for what this model has not: experts";
            return Err(ApiError::field(NAME, problem).code("unsupported_parameter"));
        }
        let asks = !steering.is_empty();
        steering = served.model.info().steering.clone().and(&steering);
        if asks {
            check(&steering, served)?;
        }
        let contrast = match contrast {
            None => None,
            Some(asked) => Some(asked.with(&steering, served)?),
        };
        Ok(Self {
            steering,
            contrast,
            told,
        })
    }
}

/// `return_routing`: a boolean, or `"all"`.
fn returned(value: Option<Value>) -> Result<Option<Told>> {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => Ok(Some(Told::Answer)),
        Some(Value::String(word)) if word == "all" => Ok(Some(Told::All)),
        Some(other) => {
            let name = format!("{NAME}.return_routing");
            Err(wrong(&name, "true, false or \"all\"", &other))
        }
    }
}

/// SGLang's fields: the first position that is told, if any is.
fn sglang(fields: &mut Fields) -> Result<Option<usize>> {
    let wanted = fields.bool(SGLANG)?.unwrap_or(false);
    let start = fields.count(SGLANG_START, 0..=usize::MAX)?;
    match (wanted, start) {
        (false, Some(1..)) => Err(ApiError::field(
            SGLANG_START,
            format!("goes only with `{SGLANG}`"),
        )),
        (false, _) => Ok(None),
        (true, start) => Ok(Some(start.unwrap_or(0))),
    }
}

/// What the keys of object `name` say; each is read alone first, so that the one that is wrong can be named.
pub(crate) fn parsed(name: &str, map: Map<String, Value>) -> Result<Steering> {
    for (key, value) in &map {
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        if let Err(error) = serde_json::from_value::<Steering>(alone) {
            let code = match error.to_string().starts_with("unknown field") {
                true => "unknown_parameter",
                false => "invalid_value",
            };
            let name = format!("{name}.{key}");
            return Err(ApiError::field(&name, format!("cannot be used: {error}")).code(code));
        }
    }
    let parsed = serde_json::from_value(Value::Object(map));
    parsed.map_err(|error| ApiError::field(name, format!("cannot be used: {error}")))
}

/// Refuses what does not fit the model.
fn check(steering: &Steering, served: &Served) -> Result<()> {
    let Err(error) = try_on(steering, &*served.model) else {
        return Ok(());
    };
    let key = match &error {
        EngineError::Steering(error) => key_of(error),
        _ => None,
    };
    let name = key.map_or_else(|| NAME.to_owned(), |key| format!("{NAME}.{key}"));
    Err(ApiError::bad(error.to_string())
        .param(&name)
        .code("invalid_value"))
}

/// Whether a steering fits a model. The smallest session there is takes the question.
pub(crate) fn try_on(steering: &Steering, model: &dyn Model) -> cadre_engine::Result<()> {
    let smallest = SessionOptions {
        n_ctx: Some(1),
        chunk: 1,
        ..SessionOptions::default()
    };
    model.steer(&mut model.session(&smallest)?, steering)
}

/// The key that an error is about, where it is one.
fn key_of(error: &SteerError) -> Option<&'static str> {
    match error {
        SteerError::UnknownLayer { rule, .. } | SteerError::UnknownExpert { rule, .. } => {
            Some(*rule)
        }
        SteerError::Contradiction { rules, .. } => Some(rules[1]),
        SteerError::BadValue { option, .. } => Some(*option),
        SteerError::TooFewLeft { .. } => Some("mask"),
        SteerError::TooManyForced { .. } => Some("force"),
        _ => None,
    }
}

/// What is told of the experts of an answer, or of a part of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) told: Told,
    pub(crate) n_prompt: usize,
    /// Tokens of the answer so far.
    pub(crate) n_tokens: usize,
    pub(crate) routed: Vec<Routed>,
}

impl Record {
    pub(crate) fn new(told: Told, n_prompt: usize) -> Self {
        Self {
            told,
            n_prompt,
            n_tokens: 0,
            routed: Vec::new(),
        }
    }

    /// Adds what follows.
    pub(crate) fn append(&mut self, next: Self) {
        self.n_tokens = next.n_tokens;
        self.routed.extend(next.routed);
    }

    /// The field `cadre` of a choice; `None` in SGLang's form.
    pub(crate) fn json(&self) -> Option<Value> {
        if matches!(self.told, Told::SgLang(_)) {
            return None;
        }
        let from = self.told.from(self.n_prompt);
        let first = self.routed.first();
        let layers: Vec<usize> = first.map_or_else(Vec::new, |routed| {
            routed.layers.iter().map(|(layer, _)| *layer).collect()
        });
        let tokens: Vec<Value> = self
            .routed
            .iter()
            .flat_map(|routed| routed.from(from))
            .map(|(routed, t)| routed.json(t))
            .collect();
        Some(json!({
            "n_prompt": self.n_prompt,
            "n_tokens": self.n_tokens,
            "routing": {"layers": layers, "tokens": tokens},
        }))
    }

    /// The field `sglext` of an answer, in SGLang's form only; `top_k` are the picks of a token, unless
    /// steering gives some more.
    pub(crate) fn sglext(&self, top_k: usize) -> Option<Value> {
        let Told::SgLang(start) = self.told else {
            return None;
        };
        let all = self.routed.iter().flat_map(|routed| &routed.layers);
        let picks = all.flat_map(|(_, routing)| routing.iter().map(|(experts, _)| experts.len()));
        let width = picks.fold(top_k, usize::max);
        let mut bytes = Vec::new();
        for (routed, t) in self.routed.iter().flat_map(|routed| routed.from(start)) {
            for (_, routing) in &routed.layers {
                let (experts, _) = routing.token(t);
                for pick in 0..width {
                    let id = experts.get(pick).map_or(-1, |expert| i32::from(*expert));
                    bytes.extend(id.to_le_bytes());
                }
            }
        }
        Some(json!({"routed_experts": base64(&bytes)}))
    }
}

impl Routed {
    /// Its tokens from this position of the sequence on.
    fn from(&self, position: usize) -> impl Iterator<Item = (&Self, usize)> {
        let known = position.saturating_sub(self.first);
        (known..self.tokens.len()).map(move |t| (self, t))
    }

    fn json(&self, t: usize) -> Value {
        let picks = self.layers.iter().map(|(_, routing)| routing.token(t));
        let (experts, weights): (Vec<&[u16]>, Vec<Vec<f64>>) = picks
            .map(|(experts, weights)| (experts, weights.iter().map(|w| shortest(*w)).collect()))
            .unzip();
        json!({
            "position": self.first + t,
            "token": self.tokens[t],
            "experts": experts,
            "weights": weights,
        })
    }
}

/// The number with the fewest digits that is the same as an `f32`.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// With padding, RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let all = chunk
            .iter()
            .fold(0_u32, |all, byte| (all << 8) | u32::from(*byte));
        let all = all << (8 * (3 - chunk.len()));
        for place in 0..4 {
            text.push(match place <= chunk.len() {
                true => char::from(LETTERS[(all >> (18 - 6 * place)) as usize & 63]),
                false => '=',
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use cadre_routing::Routing;

    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        // The test vectors of RFC 4648, section 10.
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    fn routed() -> Routed {
        let mut routing = Routing::new();
        routing.push_token(&[3, 1], &[0.75, 0.25]);
        routing.push_token(&[2], &[0.1]);
        Routed {
            first: 4,
            tokens: vec![7, 8],
            layers: vec![(1, routing)],
        }
    }

    #[test]
    fn tokens_before_the_answer_are_left_out() {
        let mut record = Record::new(Told::Answer, 6);
        record.routed.push(routed());
        assert_eq!(
            record.json().unwrap()["routing"],
            json!({"layers": [1], "tokens": [
                {"position": 5, "token": 8, "experts": [[2]], "weights": [[0.1]]},
            ]})
        );
        record.told = Told::All;
        let all = record.json().unwrap();
        assert_eq!(all["routing"]["tokens"][0]["experts"], json!([[3, 1]]));
        assert_eq!(record.sglext(2), None);
    }

    #[test]
    fn sglang_gets_little_endian_ids_with_gaps() {
        let mut record = Record::new(Told::SgLang(0), 6);
        record.routed.push(routed());
        let ids: Vec<u8> = [3_i32, 1, 2, -1]
            .iter()
            .flat_map(|id| id.to_le_bytes())
            .collect();
        let told = record.sglext(2).unwrap();
        assert_eq!(told["routed_experts"], base64(&ids));
        assert_eq!(record.json(), None);
    }

    #[test]
    fn a_key_that_is_wrong_is_named() {
        let parse = |text: &str| parsed(NAME, serde_json::from_str(text).unwrap());
        assert!(parse(r#"{"top_k": 2, "mask": {"0-1": [3]}}"#).is_ok());
        for (text, param) in [
            (r#"{"top_k": 2, "masks": {}}"#, "cadre.masks"),
            (r#"{"top_k": -2}"#, "cadre.top_k"),
            (r#"{"mask": [1]}"#, "cadre.mask"),
            (r#"{"bias": {"0": {"x": 1}}}"#, "cadre.bias"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.json()["error"]["param"], param, "{text}");
        }
    }
}
