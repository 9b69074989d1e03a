//! `/v1/embeddings`: texts as vectors.
//!
//! A text's vector is the mean over its tokens of what the last layer hands to the head (after the last norm), or what it hands over for the last
//! token, scaled to length 1. Models that were not trained for it give vectors of little use.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::completions::{Prompt, prompts};
use super::error::{ApiError, Result};
use super::fields::Fields;
use super::generation::{IGNORED, Wanted, room};
use crate::schedule::{Event, Job, JobError, Jobs, Pooling};
use crate::served::Served;

/// A request, understood.
pub(crate) struct Asked {
    pub(crate) jobs: Vec<Job>,
    n_prompt: usize,
    as_base64: bool,
}

/// Understands a request.
pub(crate) fn prepare(body: &[u8], served: &Served) -> Result<Asked> {
    let mut fields = Fields::parse(body)?;
    let input = prompts("input", fields.need("input")?, served)?;
    let as_base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::field(
                "encoding_format",
                "is neither float nor base64",
            ));
        }
    };
    let pooling = match fields.text("pooling")?.as_deref() {
        None | Some("mean") => Pooling::Mean,
        Some("last") => Pooling::Last,
        Some(_) => return Err(ApiError::field("pooling", "is neither mean nor last")),
    };
    fields.refuse("dimensions", "vectors are as wide as the model")?;
    // The model's name, and how it is steered; what is drawn does not matter, since nothing is.
    let wanted = Wanted::for_model(&mut fields, served)?;
    fields.finish(IGNORED)?;
    let job = |prompt: &Prompt| {
        room(served, prompt.tokens.len(), Some(0), 0)?;
        Ok(Job {
            embeds: Some(pooling),
            ..wanted.job(&prompt.tokens, 0, 0)
        })
    };
    Ok(Asked {
        jobs: input.iter().map(job).collect::<Result<_>>()?,
        n_prompt: input.iter().map(|prompt| prompt.tokens.len()).sum(),
        as_base64,
    })
}

/// The answer to `n` jobs.
pub(crate) async fn answer(
    mut jobs: Jobs,
    (n, n_prompt, as_base64): (usize, usize, bool),
    model: &str,
) -> Result<Value> {
    let mut vectors: Vec<Option<Vec<f32>>> = vec![None; n];
    let mut n_left = n;
    while n_left > 0 {
        match jobs.events.recv().await {
            Some((index, Event::Embedding(vector))) => vectors[index] = Some(vector),
            Some((_, Event::Done(_))) => n_left -= 1,
            Some((_, Event::Failed(error))) => return Err(error.into()),
            Some(_) => {}
            None => return Err(JobError::Ended.into()),
        }
    }
    let spelled = |(index, vector): (usize, Option<Vec<f32>>)| {
        let vector = scaled(vector.unwrap_or_default());
        let embedding = match as_base64 {
            true => json!(STANDARD.encode(bytes_of(&vector))),
            false => json!(vector),
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    };
    let data: Vec<Value> = vectors.into_iter().enumerate().map(spelled).collect();
    Ok(json!({
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": n_prompt, "total_tokens": n_prompt},
    }))
}

impl Asked {
    /// Numbers that [`answer`] needs.
    pub(crate) fn shape(&self) -> (usize, usize, bool) {
        (self.jobs.len(), self.n_prompt, self.as_base64)
    }
}

/// Of length 1; nothing is left as it is.
fn scaled(mut vector: Vec<f32>) -> Vec<f32> {
    let square: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    if square > 0.0 {
        let length = square.sqrt();
        for x in &mut vector {
            *x = (f64::from(*x) / length) as f32;
        }
    }
    vector
}

/// Little-endian.
fn bytes_of(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one() {
        assert_eq!(scaled(vec![3.0, 0.0, -4.0]), [0.6, 0.0, -0.8]);
        assert_eq!(scaled(vec![0.0, 0.0]), [0.0, 0.0]);
        assert_eq!(bytes_of(&[1.0]), [0, 0, 0x80, 0x3f]);
    }
}
