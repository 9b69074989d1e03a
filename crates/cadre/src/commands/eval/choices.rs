//! `cadre eval choices`: which of several answers a model finds the most likely.
//!
//! As lm_eval's `multiple_choice`: an answer's score is the sum of the log likelihoods of its tokens after the prompt; `acc`
//! is the share of questions whose right answer has the highest one, `acc_norm` that with scores divided by the number of
//! characters. White space at the end of a prompt goes to the answers, so that words keep the space before them.

use anyhow::{Result, ensure};
use cadre_engine::eval::log_likelihood;
use serde::{Deserialize, Serialize};

use super::questions::{Asked, QuestionArgs, Tally, about};
use crate::cli::App;
use crate::data::unnamed;
use crate::output::bar;

/// Arguments of `cadre eval choices`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    questions: QuestionArgs,
    /// Between a prompt and an answer (lm_eval's `target_delimiter`).
    #[arg(long, value_name = "TEXT", default_value = " ")]
    delimiter: String,
}

const HINT: &str = r#"each line is one question: {"domain": "code", "prompt": "...", "choices": ["...", "..."], "answer": 0}"#;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    #[serde(default = "unnamed")]
    domain: String,
    prompt: String,
    choices: Vec<String>,
    /// Index of the right one.
    answer: usize,
}

/// What came of a question.
#[derive(Debug, Serialize)]
struct Sample {
    /// Per choice, in nats.
    log_likelihoods: Vec<f64>,
    /// The most likely one.
    picked: usize,
    /// The most likely one per character.
    picked_norm: usize,
}

/// Asks and prints.
pub(super) fn run(app: &App, args: &Args) -> Result<()> {
    let questions: Vec<Question> = args.questions.read(HINT)?;
    for question in &questions {
        about(check(question), &question.prompt)?;
    }
    let mut asked = args.questions.load(app)?;
    let progress = bar(&app.env, "questions", questions.len() as u64);
    let mut tally = Tally::new(["acc", "acc_norm"]);
    let mut read = Vec::new();
    for question in &questions {
        app.interrupt.check()?;
        let sample = about(
            ask(&mut asked, &mut read, question, &args.delimiter),
            &question.prompt,
        )?;
        let right = [sample.picked, sample.picked_norm].map(|picked| picked == question.answer);
        tally.add(&question.domain, right, &sample)?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    tally.print(&asked, &args.questions)
}

fn check(question: &Question) -> Result<()> {
    let n = question.choices.len();
    ensure!(n >= 2, "`choices` has {n}; two or more are needed");
    ensure!(
        question.answer < n,
        "`answer` is {}; it is the index of one of {n} choices, from 0",
        question.answer
    );
    ensure!(
        question.choices.iter().all(|choice| !choice.is_empty()),
        "one of `choices` is empty"
    );
    ensure!(!question.prompt.trim().is_empty(), "`prompt` is empty");
    Ok(())
}

fn ask(
    asked: &mut Asked,
    read: &mut Vec<u32>,
    question: &Question,
    delimiter: &str,
) -> Result<Sample> {
    let context = asked.encode(question.prompt.trim_end())?;
    let mut log_likelihoods = Vec::with_capacity(question.choices.len());
    for choice in &question.choices {
        let whole = asked.encode(&format!("{}{delimiter}{choice}", question.prompt))?;
        let rest = whole.get(context.len()..).unwrap_or_default();
        let model = &*asked.loaded.model;
        let score = log_likelihood(model, &mut asked.session, read, &context, rest)?;
        log_likelihoods.push(score);
    }
    let lengths = question.choices.iter().map(|choice| choice.chars().count());
    let per_character: Vec<f64> = log_likelihoods
        .iter()
        .zip(lengths)
        .map(|(score, length)| score / length as f64)
        .collect();
    Ok(Sample {
        picked: highest(&log_likelihoods),
        picked_norm: highest(&per_character),
        log_likelihoods,
    })
}

/// The index of the highest score, the first of equal ones.
fn highest(scores: &[f64]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_scores_is_picked() {
        assert_eq!(highest(&[-2.0, -1.0, -1.0]), 1);
        assert_eq!(highest(&[-1.0]), 0);
    }

    #[test]
    fn questions_that_cannot_be_asked_are_refused() {
        let refused = |line: &str| {
            let question: Question = serde_json::from_str(line).unwrap();
            check(&question).unwrap_err().to_string()
        };
        let line = r#"{"prompt": "a", "choices": ["b", "c"], "answer": 2}"#;
        assert!(refused(line).contains("`answer` is 2"));
        let line = r#"{"prompt": "a", "choices": ["b"], "answer": 0}"#;
        assert!(refused(line).contains("two or more"));
        let line = r#"{"prompt": " ", "choices": ["b", "c"], "answer": 0}"#;
        assert!(refused(line).contains("`prompt` is empty"));
        let line = r#"{"prompt": "a", "choices": ["b", ""], "answer": 0}"#;
        assert!(refused(line).contains("is empty"));
    }
}
