//! What requests for text have in common: the fields that say how tokens are drawn, and the room that there is.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use cadre_engine::SamplingOptions;
use serde_json::Value;

use super::choice::Choice;
use super::error::{ApiError, Result};
use super::experts::{Experts, Told};
use super::fields::{Fields, whole, wrong};
use crate::schedule::{DrawOptions, Job};
use crate::served::Served;

/// Choices of a request, over all of its prompts.
pub(crate) const MOST_CHOICES: usize = 128;
/// Stop strings of a request.
const MOST_STOPS: usize = 16;
/// Bytes of a stop string.
const LONGEST_STOP: usize = 1024;
/// Entries of lists of tokens in a request.
const MOST_TOKENS: usize = 4096;
/// Alternatives that are told for a token.
pub(crate) const MOST_ALTERNATIVES: usize = 20;

/// Fields that are taken and change nothing here: they are about billing, storage and other people's caches.
pub(crate) const IGNORED: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_prompt",
    "prediction",
];

/// What is drawn, how, and how it is told.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) draw: DrawOptions,
    /// Answers per prompt.
    pub(crate) n: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) streams: bool,
    pub(crate) include_usage: bool,
    /// Alternatives of every token; `None` where no scores are wanted.
    pub(crate) alternatives: Option<usize>,
    /// How experts are picked and told.
    pub(crate) experts: Experts,
}

impl Wanted {
    /// Reads the fields that every request for text may have.
    pub(crate) fn read(fields: &mut Fields, served: &Served) -> Result<Self> {
        served.check_name(fields.text("model")?.as_deref())?;
        fields.refuse("grammar", "only the model's own distribution is drawn from")?;
        let streams = fields.bool("stream")?.unwrap_or(false);
        let include_usage = match fields.object("stream_options")? {
            None => false,
            Some(_) if !streams => {
                return Err(ApiError::field("stream_options", "goes only with `stream`"));
            }
            Some(mut options) => {
                let usage = options.bool("include_usage")?.unwrap_or(false);
                options.finish(&["include_obfuscation"])?;
                usage
            }
        };
        let n = fields.count("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        let mut stop_tokens = match fields.bool("ignore_eos")? {
            Some(true) => Vec::new(),
            _ => served.stop_tokens.to_vec(),
        };
        if let Some(value) = fields.take("stop_token_ids") {
            stop_tokens.extend(tokens("stop_token_ids", &value, served)?);
        }
        let experts = Experts::read(fields, served)?;
        if matches!(experts.told, Some(Told::SgLang(_))) && n > 1 {
            let problem = "goes only with one answer, `n` = 1";
            return Err(ApiError::field("return_routed_experts", problem));
        }
        Ok(Self {
            draw: draw(fields, served)?,
            n,
            stops: stops(fields)?,
            stop_tokens: stop_tokens.into(),
            streams,
            include_usage,
            alternatives: None,
            experts,
        })
    }

    /// Reads only the fields that are about the model: nothing will be drawn.
    pub(crate) fn for_model(fields: &mut Fields, served: &Served) -> Result<Self> {
        served.check_name(fields.text("model")?.as_deref())?;
        Ok(Self {
            experts: Experts::of_model(fields, served)?,
            draw: draw(&mut Fields::default(), served)?,
            n: 1,
            stops: Vec::new(),
            stop_tokens: Arc::new([]),
            streams: false,
            include_usage: false,
            alternatives: None,
        })
    }

    /// A choice that tells its experts, if that is wanted.
    pub(crate) fn recording(&self, choice: Choice, n_prompt: usize) -> Choice {
        match self.experts.told {
            Some(told) => choice.recording(told, n_prompt),
            None => choice,
        }
    }

    /// The job of choice `index` of `prompt`. The first choice is what a request for one would get.
    pub(crate) fn job(&self, prompt: &Arc<[u32]>, index: usize, max_new_tokens: usize) -> Job {
        let mut draw = self.draw.clone();
        draw.sampling.seed = draw.sampling.seed.wrapping_add(index as u64);
        Job {
            prompt: Arc::clone(prompt),
            max_new_tokens,
            stop_tokens: Arc::clone(&self.stop_tokens),
            draw,
            alternatives: self.alternatives,
            scores_prompt: false,
            embeds: None,
            steering: self.experts.steering.clone(),
            contrast: self.experts.contrast.clone(),
            routed_from: self.experts.told.map(|told| told.from(prompt.len())),
            constraint: None,
        }
    }
}

fn draw(fields: &mut Fields, served: &Served) -> Result<DrawOptions> {
    let sampling = SamplingOptions {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        // vLLM's clients switch it off with -1, llama.cpp's with 0.
        top_k: usize::try_from(fields.whole("top_k", -1..=i64::MAX)?.unwrap_or(0)).unwrap_or(0),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=10.0)?
            .unwrap_or(1.0),
        seed: seed(fields)?,
    };
    let sampling = SamplingOptions {
        // Nothing is more probable than the most probable token.
        temperature: match sampling.top_p > 0.0 {
            true => sampling.temperature,
            false => 0.0,
        },
        top_p: match sampling.top_p > 0.0 {
            true => sampling.top_p,
            false => 1.0,
        },
        ..sampling
    };
    let checked = sampling.check();
    checked.map_err(|error| ApiError::bad(error.to_string()))?;
    Ok(DrawOptions {
        sampling,
        bias: biases(fields, served)?.into(),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        min_new_tokens: fields.count("min_tokens", 0..=served.n_ctx)?.unwrap_or(0),
    })
}

/// Without one every answer differs.
fn seed(fields: &mut Fields) -> Result<u64> {
    match fields.take("seed") {
        // A new hasher is seeded by the operating system.
        None => Ok(RandomState::new().build_hasher().finish()),
        Some(value) => value
            .as_u64()
            .or_else(|| Some(whole(&value)?.cast_unsigned()))
            .ok_or_else(|| wrong("seed", "a whole number", &value)),
    }
}

fn biases(fields: &mut Fields, served: &Served) -> Result<Vec<(u32, f32)>> {
    const NAME: &str = "logit_bias";
    let value = match fields.take(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong(NAME, "an object", &other)),
    };
    if value.len() > MOST_TOKENS {
        let problem = format!(
            "has {} entries, at most {MOST_TOKENS} are read",
            value.len()
        );
        return Err(ApiError::field(NAME, problem));
    }
    let entry = |(key, value): (&String, &Value)| {
        let token = key.parse().ok().filter(|token| served.has_token(*token));
        let bias = value
            .as_f64()
            .filter(|bias| (-100.0..=100.0).contains(bias));
        match (token, bias) {
            (Some(token), Some(bias)) => Ok((token, bias as f32)),
            _ => {
                let key: String = key.chars().take(20).collect();
                let problem = format!(
                    "maps token ids, 0 to {}, to numbers from -100 to 100; look at `{key}`",
                    served.n_tokens().saturating_sub(1)
                );
                Err(ApiError::field(NAME, problem))
            }
        }
    };
    value.iter().map(entry).collect()
}

fn stops(fields: &mut Fields) -> Result<Vec<String>> {
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(items)) => {
            if items.len() > MOST_STOPS {
                let problem = format!("has {} strings, at most {MOST_STOPS}", items.len());
                return Err(ApiError::field("stop", problem));
            }
            let text = |item| match item {
                Value::String(stop) => Ok(stop),
                other => Err(wrong("stop", "a list of strings", &other)),
            };
            items.into_iter().map(text).collect::<Result<_>>()?
        }
        Some(other) => return Err(wrong("stop", "a string or a list of them", &other)),
    };
    match stops.iter().find(|stop| stop.len() > LONGEST_STOP) {
        None => Ok(stops),
        Some(long) => {
            let problem = format!(
                "has a string of {} bytes, at most {LONGEST_STOP}",
                long.len()
            );
            Err(ApiError::field("stop", problem))
        }
    }
}

/// A list of token ids.
pub(crate) fn tokens(name: &str, value: &Value, served: &Served) -> Result<Vec<u32>> {
    let Value::Array(items) = value else {
        return Err(wrong(name, "a list of token ids", value));
    };
    let token = |item: &Value| {
        let id = whole(item).ok_or_else(|| wrong(name, "a list of token ids", item))?;
        let id = u32::try_from(id).ok().filter(|id| served.has_token(*id));
        id.ok_or_else(|| {
            let problem = format!(
                "has token {item}, expected 0 to {}",
                served.n_tokens().saturating_sub(1)
            );
            ApiError::field(name, problem)
        })
    };
    items.iter().map(token).collect()
}

/// How many new tokens there may be after `n_prompt`: what is asked for, or `default`, if that fits.
pub(crate) fn room(
    served: &Served,
    n_prompt: usize,
    asked: Option<usize>,
    default: usize,
) -> Result<usize> {
    let n_ctx = served.n_ctx;
    // The last token is drawn and not read.
    let most = (n_ctx + 1).saturating_sub(n_prompt);
    let new = asked.unwrap_or(0);
    if n_prompt <= n_ctx && new <= most {
        return Ok(asked.unwrap_or(default.min(most)));
    }
    let message = format!(
        "this model's maximum context length is {n_ctx} tokens, but the request asks for {} ({n_prompt} in the prompt, \
         {new} new ones); shorten it, or start the server with a larger -c",
        n_prompt.saturating_add(new)
    );
    Err(ApiError::bad(message).code("context_length_exceeded"))
}

/// The error of a text that has more tokens than the context, which is seen from its length.
pub(crate) fn too_long(served: &Served, n_bytes: usize) -> ApiError {
    let message = format!(
        "this model's maximum context length is {} tokens, but the prompt has {n_bytes} bytes, which are more",
        served.n_ctx
    );
    ApiError::bad(message).code("context_length_exceeded")
}
