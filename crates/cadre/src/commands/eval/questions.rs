//! What evaluations by questions share: their arguments, counting right answers, and telling how many there were.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cadre_checkpoint::{EncodeOptions, Tokenizer};
use cadre_engine::{Session, SessionOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::data::read_lines;
use crate::lossy::Said;
use crate::model::{Loaded, ModelArgs};
use crate::output::{Format, Out};

/// Arguments of evaluations by questions.
#[derive(Debug, clap::Args)]
pub(super) struct QuestionArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// JSON lines, one question each; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Tokens that the model sees at most; 0 means what the model allows, up to 4096.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Begin with the tokens that the model wants before a prompt (lm_eval's `add_bos_token`).
    #[arg(long)]
    add_bos: bool,
    /// Also tell what came of every question (with -o json).
    #[arg(long)]
    samples: bool,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// What questions are put to.
pub(super) struct Asked {
    pub(super) loaded: Loaded,
    pub(super) tokenizer: Tokenizer,
    pub(super) session: Session,
    pub(super) encoding: EncodeOptions,
}

impl QuestionArgs {
    /// The questions of all files; `hint` shows one.
    pub(super) fn read<T: DeserializeOwned>(&self, hint: &str) -> Result<Vec<T>> {
        let mut questions = Vec::new();
        for path in &self.data {
            questions.extend(read_lines(path, hint)?);
        }
        Ok(questions)
    }

    pub(super) fn load(&self, app: &App) -> Result<Asked> {
        let options = SessionOptions {
            n_ctx: (self.ctx_size > 0).then_some(self.ctx_size),
            kv: self.cache.formats(),
            ..SessionOptions::default()
        };
        let loaded = self.model.load(app, &options)?;
        Ok(Asked {
            tokenizer: loaded.tokenizer()?,
            session: loaded.model.session(&options)?,
            loaded,
            encoding: EncodeOptions {
                add_special: self.add_bos,
                ..EncodeOptions::RENDERED
            },
        })
    }
}

impl Asked {
    /// The tokens of a prompt, of which there must be some.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode_with(text, self.encoding)?;
        anyhow::ensure!(!tokens.is_empty(), "a prompt needs text");
        Ok(tokens)
    }
}

/// Names the question that a problem is about.
pub(super) fn about<T>(result: Result<T>, prompt: &str) -> Result<T> {
    result.with_context(|| {
        let shown: String = prompt.chars().take(60).collect();
        format!("the question {shown:?}")
    })
}

/// How many questions went well.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    n: u64,
    n_right: u64,
}

impl Count {
    fn add(&mut self, is_right: bool) {
        self.n += 1;
        self.n_right += u64::from(is_right);
    }

    fn share(self) -> f64 {
        self.n_right as f64 / self.n as f64
    }

    /// Standard error of the share: the deviation of a sample over the root of its size. NaN for a single question.
    fn error(self) -> f64 {
        let share = self.share();
        (share * (1.0 - share) / (self.n as f64 - 1.0)).sqrt()
    }
}

/// Right answers by what is counted and by domain, and what came of every question.
pub(super) struct Tally<const N: usize> {
    /// Names of what is counted, in lm_eval's words.
    names: [&'static str; N],
    total: [Count; N],
    domains: BTreeMap<String, [Count; N]>,
    samples: Vec<Value>,
}

impl<const N: usize> Tally<N> {
    pub(super) fn new(names: [&'static str; N]) -> Self {
        Self {
            names,
            total: [Count::default(); N],
            domains: BTreeMap::new(),
            samples: Vec::new(),
        }
    }

    /// Counts a question; `sample` is what came of it.
    pub(super) fn add(
        &mut self,
        domain: &str,
        right: [bool; N],
        sample: &impl Serialize,
    ) -> Result<()> {
        let domain = self
            .domains
            .entry(domain.to_owned())
            .or_insert([Count::default(); N]);
        for ((one, all), is_right) in domain.iter_mut().zip(&mut self.total).zip(right) {
            one.add(is_right);
            all.add(is_right);
        }
        self.samples.push(serde_json::to_value(sample)?);
        Ok(())
    }

    pub(super) fn print(self, asked: &Asked, args: &QuestionArgs) -> Result<()> {
        let mut out = Out::new();
        let lossy = Said::of(asked.loaded.model.info());
        match args.output {
            Format::Json => {
                let mut report = self.numbers(&self.total);
                let domains = self.domains.iter();
                let domains: Map<String, Value> = domains
                    .map(|(name, counts)| (name.clone(), self.numbers(counts).into()))
                    .collect();
                report.insert("domains".to_owned(), domains.into());
                report.insert("lossy".to_owned(), serde_json::to_value(&lossy)?);
                if args.samples {
                    report.insert("samples".to_owned(), self.samples.into());
                }
                out.json(&report)?;
            }
            Format::Text => out.write(&self.table(&lossy))?,
        }
        out.finish()
    }

    fn numbers(&self, counts: &[Count; N]) -> Map<String, Value> {
        let mut numbers = Map::new();
        let n = counts.first().map_or(0, |count| count.n);
        numbers.insert("questions".to_owned(), json!(n));
        for (name, count) in self.names.iter().zip(counts) {
            numbers.insert((*name).to_owned(), json!(count.share()));
            numbers.insert(format!("{name}_stderr"), json!(count.error()));
        }
        numbers
    }

    fn table(&self, lossy: &Said) -> String {
        let names = self.domains.keys().map(|name| name.chars().count());
        let width = names.max().unwrap_or(0).max("domain".len());
        let mut text = format!("{:width$}  {:>9}", "domain", "questions");
        for name in self.names {
            text += &format!("  {name:>11}  {:>7}", "stderr");
        }
        text.push('\n');
        let rows = self.domains.iter();
        let rows = rows.map(|(name, counts)| (name.as_str(), counts));
        for (name, counts) in rows.chain([("all", &self.total)]) {
            let n = counts.first().map_or(0, |count| count.n);
            text += &format!("{name:width$}  {n:>9}");
            for count in counts {
                text += &format!("  {:>11.4}  {:>7.4}", count.share(), count.error());
            }
            text.push('\n');
        }
        if let Some(rules) = lossy.rules() {
            text += &format!("lossy={rules}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_the_error_of_a_sample() {
        let mut count = Count::default();
        for is_right in [true, false, false, true, true] {
            count.add(is_right);
        }
        assert_eq!(count.share(), 0.6);
        // The deviation of 1, 0, 0, 1, 1 is the root of 0.3; that of their mean is the root of 0.06.
        assert!((count.error() - 0.06f64.sqrt()).abs() < 1e-15);
        let mut one = Count::default();
        one.add(true);
        assert!(one.error().is_nan());
    }
}
