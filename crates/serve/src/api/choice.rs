//! One answer as it grows: from tokens to text, stop strings, and the scores that belong to text that was told.

use std::collections::VecDeque;

use cadre_checkpoint::{StopMatcher, TokenStream, Tokenizer};

use super::experts::{Record, Told};
use super::tools::{ToolCall, ToolParser};
use crate::schedule::{Finish, Routed, Scored};

/// A token's score, and where its text starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) token: u32,
    /// The first token of all has no score.
    pub(crate) scored: Option<Scored>,
    /// Characters before it.
    pub(crate) offset: usize,
}

/// Why an answer has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By a token of the model's own.
    Token,
    /// By this stop string.
    Text(String),
    /// As long as it may be.
    Length,
    /// With calls of tools.
    Calls,
}

impl End {
    /// OpenAI's word.
    pub(crate) fn openai(&self) -> &'static str {
        match self {
            Self::Token | Self::Text(_) => "stop",
            Self::Length => "length",
            Self::Calls => "tool_calls",
        }
    }
}

/// What came of an event.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Scores of tokens, where they are wanted.
    pub(crate) entries: Vec<Entry>,
    /// Calls of tools.
    pub(crate) calls: Vec<ToolCall>,
    /// Why there is no more, if so.
    pub(crate) end: Option<End>,
    /// What the experts did, where that is wanted.
    pub(crate) record: Option<Record>,
}

impl Piece {
    pub(crate) fn is_empty(&self) -> bool {
        let is_silent = self.text.is_empty() && self.calls.is_empty();
        is_silent && self.entries.is_empty() && self.end.is_none()
    }

    /// Adds what follows.
    pub(crate) fn append(&mut self, next: Self) {
        self.text += &next.text;
        self.entries.extend(next.entries);
        self.calls.extend(next.calls);
        self.end = next.end.or(self.end.take());
        match (self.record.as_mut(), next.record) {
            (Some(record), Some(next)) => record.append(next),
            (Some(_), None) => {}
            (None, next) => self.record = next,
        }
    }
}

/// A prompt that is part of the answer.
#[derive(Clone, Debug)]
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Its tokens; empty where no scores are wanted.
    pub(crate) tokens: Vec<u32>,
}

/// An answer that grows.
#[derive(Debug)]
pub(crate) struct Choice {
    tokens: TokenStream<'static>,
    stops: StopMatcher,
    /// Where tools may be called.
    tools: Option<ToolParser>,
    /// What has not been told.
    echo: Option<Echo>,
    echo_scores: Vec<Scored>,
    waiting: VecDeque<Entry>,
    /// Where the experts are told: what has not been.
    record: Option<Record>,
    /// Characters that tokens gave, and those of them that were told.
    n_chars: usize,
    n_told: usize,
    /// Tokens that were drawn.
    pub(crate) n_tokens: usize,
    pub(crate) has_ended: bool,
}

impl Choice {
    /// An answer whose text `tokens` makes.
    pub(crate) fn new(tokens: TokenStream<'static>, stops: &[String], echo: Option<Echo>) -> Self {
        Self {
            tokens,
            stops: StopMatcher::new(stops),
            tools: None,
            echo,
            echo_scores: Vec::new(),
            waiting: VecDeque::new(),
            record: None,
            n_chars: 0,
            n_told: 0,
            n_tokens: 0,
            has_ended: false,
        }
    }

    /// Looks for calls of tools.
    pub(crate) fn calling(self) -> Self {
        Self {
            tools: Some(ToolParser::default()),
            ..self
        }
    }

    /// Tells the experts, after a prompt of so many tokens.
    pub(crate) fn recording(self, told: Told, n_prompt: usize) -> Self {
        Self {
            record: Some(Record::new(told, n_prompt)),
            ..self
        }
    }

    /// What the experts did with tokens that were read.
    pub(crate) fn routed(&mut self, routed: Routed) {
        if let Some(record) = &mut self.record {
            record.routed.push(routed);
        }
    }

    /// Gives a piece that is told what is known of the experts.
    fn with_record(&mut self, mut piece: Piece) -> Piece {
        if let Some(record) = &mut self.record
            && !piece.is_empty()
        {
            let next = Record::new(record.told, record.n_prompt);
            let mut known = std::mem::replace(record, next);
            known.n_tokens = self.n_tokens;
            piece.record = Some(known);
        }
        piece
    }

    /// Scores of tokens of the prompt.
    pub(crate) fn prompt(&mut self, scores: Vec<Scored>) {
        self.echo_scores.extend(scores);
    }

    /// A token was drawn.
    pub(crate) fn token(
        &mut self,
        token: u32,
        scored: Option<Scored>,
        tokenizer: &Tokenizer,
    ) -> Piece {
        let mut piece = self.begin(tokenizer);
        self.n_tokens += 1;
        if let Some(scored) = scored {
            self.waiting.push_back(Entry {
                token,
                scored: Some(scored),
                offset: self.n_chars,
            });
        }
        let text = self.tokens.push(token);
        self.n_chars += text.chars().count();
        let released = self.stops.push(&text);
        let end = released.stopped.then(|| self.stopped());
        piece.append(self.told(released.text, end));
        self.with_record(piece)
    }

    /// The score of the token that ends the text, which is no part of it.
    pub(crate) fn ending(&mut self, scored: Scored, tokenizer: &Tokenizer) -> Piece {
        let piece = self.begin(tokenizer);
        self.waiting.push_back(Entry {
            token: scored.token,
            scored: Some(scored),
            offset: self.n_chars,
        });
        self.with_record(piece)
    }

    /// There are no more tokens.
    pub(crate) fn end(&mut self, finish: Finish, tokenizer: &Tokenizer) -> Piece {
        let mut piece = self.begin(tokenizer);
        let rest = self.tokens.finish();
        self.n_chars += rest.chars().count();
        let released = self.stops.push(&rest);
        let mut text = released.text;
        let mut end = match finish {
            Finish::Stop => End::Token,
            Finish::Length => End::Length,
        };
        if released.stopped {
            end = self.stopped();
        } else {
            text += &self.stops.finish();
        }
        piece.append(self.told(text, Some(end)));
        if !released.stopped {
            // Tokens at the end that gave no text.
            piece.entries.extend(self.waiting.drain(..));
        }
        self.with_record(piece)
    }

    fn stopped(&self) -> End {
        End::Text(self.stops.found().unwrap_or_default().to_owned())
    }

    /// The prompt, the first time.
    fn begin(&mut self, tokenizer: &Tokenizer) -> Piece {
        let Some(echo) = self.echo.take() else {
            return Piece::default();
        };
        let mut stream = tokenizer.stream();
        let mut offset = 0;
        let mut scores = std::mem::take(&mut self.echo_scores).into_iter();
        let mut entries = Vec::with_capacity(echo.tokens.len());
        for (i, token) in echo.tokens.iter().enumerate() {
            entries.push(Entry {
                token: *token,
                scored: if i == 0 { None } else { scores.next() },
                offset,
            });
            offset += stream.push(*token).chars().count();
        }
        self.n_chars = echo.text.chars().count();
        self.n_told = self.n_chars;
        Piece {
            text: echo.text,
            entries,
            ..Piece::default()
        }
    }

    /// Text that may be told, with the scores of its tokens.
    fn told(&mut self, text: String, end: Option<End>) -> Piece {
        self.n_told += text.chars().count();
        self.has_ended |= end.is_some();
        let mut entries = Vec::new();
        while let Some(entry) = self
            .waiting
            .pop_front_if(|entry| entry.offset < self.n_told)
        {
            entries.push(entry);
        }
        let mut piece = Piece {
            text,
            entries,
            end,
            ..Piece::default()
        };
        if let Some(tools) = &mut self.tools {
            (piece.text, piece.calls) = tools.push(&piece.text);
            if let Some(end) = &mut piece.end {
                let (rest, calls) = tools.finish();
                piece.text += &rest;
                piece.calls.extend(calls);
                if tools.has_called() && *end == End::Token {
                    *end = End::Calls;
                }
            }
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use cadre_testkit::tiny_tokenizer_json;

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_json("t", &tiny_tokenizer_json(300).unwrap()).unwrap()
    }

    fn scored(token: u32) -> Option<Scored> {
        Some(Scored {
            token,
            log_prob: -1.0,
            top: Vec::new(),
        })
    }

    /// All pieces of an answer of the tokens of `text`, put together.
    fn told(text: &str, stops: &[&str], echo: Option<Echo>) -> Piece {
        let tokenizer = tokenizer();
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut choice = Choice::new(tokenizer.stream().into_owned(), &stops, echo);
        let mut all = Piece::default();
        for token in tokenizer.encode(text).unwrap() {
            all.append(choice.token(token, scored(token), &tokenizer));
            if choice.has_ended {
                return all;
            }
        }
        all.append(choice.end(Finish::Length, &tokenizer));
        all
    }

    #[test]
    fn text_and_scores_belong_together() {
        let tokenizer = tokenizer();
        let whole = told("the cat and the mill", &[], None);
        assert_eq!(
            (whole.text.as_str(), whole.end),
            ("the cat and the mill", Some(End::Length))
        );
        let tokens: Vec<u32> = whole.entries.iter().map(|entry| entry.token).collect();
        assert_eq!(tokens, tokenizer.encode("the cat and the mill").unwrap());
        for entry in &whole.entries {
            let spelled = tokenizer.decode(&[entry.token]);
            assert!(
                whole.text[entry.offset..].starts_with(&spelled),
                "{entry:?}"
            );
        }
    }

    #[test]
    fn a_stop_string_takes_its_tokens_with_it() {
        let cut = told("the cat and the mill", &["and"], None);
        assert_eq!(
            (cut.text.as_str(), cut.end),
            ("the cat ", Some(End::Text("and".to_owned())))
        );
        assert!(
            cut.entries
                .iter()
                .all(|entry| entry.offset < cut.text.len())
        );
        let only = told("the", &["the"], None);
        assert_eq!((only.text.as_str(), only.entries.len()), ("", 0));
    }

    #[test]
    fn an_echo_comes_first_and_its_first_token_has_no_score() {
        let tokenizer = tokenizer();
        let echo = Echo {
            text: "\u{fc}ber ".to_owned(),
            tokens: tokenizer.encode("\u{fc}ber ").unwrap(),
        };
        let n = echo.tokens.len();
        let whole = told("cat", &[], Some(echo));
        assert_eq!(whole.text, "\u{fc}ber cat");
        assert!(whole.entries[0].scored.is_none() && whole.entries.len() > n);
        // Offsets count characters: the first one has two bytes.
        assert_eq!(whole.entries[n].offset, 5);
    }
}
