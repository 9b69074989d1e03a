//! Answers in a form that was asked for: JSON, or JSON of a schema, held to it token by token.
//!
//! The library `llguidance` knows which tokens may follow; a [`Held`] answer is drawn from those alone.

use std::sync::{Arc, OnceLock};

use cadre_checkpoint::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::schedule::Constraint;

/// Most steps of compiling a schema: a quarter of a second.
const SCHEMA_FUEL: u64 = 2_000_000;
/// Symbols of a schema's grammar.
const SCHEMA_SYMBOLS: usize = 200_000;
/// States of the lexer of one answer, of one to two kB each.
const LEXER_STATES: usize = 50_000;

/// Makes constraints for the tokens of a model.
pub(crate) struct Grammars {
    n_tokens: usize,
    /// Tokens that end a text.
    stop_tokens: Arc<[u32]>,
    /// Made when it is first needed: it sorts the vocabulary.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Grammars {
    /// For a model with so many logits.
    pub(crate) fn new(n_tokens: usize, stop_tokens: Arc<[u32]>) -> Self {
        Self {
            n_tokens,
            stop_tokens,
            factory: OnceLock::new(),
        }
    }

    /// Holds an answer to a JSON schema.
    ///
    /// # Errors
    /// What is wrong with the schema.
    pub(crate) fn json(&self, schema: Value, tokenizer: &Tokenizer) -> Result<Held, String> {
        let factory = self.factory.get_or_init(|| self.factory(tokenizer));
        let factory = factory.as_ref().map_err(String::clone)?;
        let mut schema = schema;
        if !schema.is_object() {
            return Err("it is no object".to_owned());
        }
        // As Python writes JSON. White space is free in JSON, and weak models never end it.
        JsonCompileOptions {
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            whitespace_flexible: false,
            ..JsonCompileOptions::default()
        }
        .apply_to(&mut schema);
        let parser = factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            None => Ok(Held { matcher }),
            Some(error) => Err(error),
        }
    }

    fn factory(&self, tokenizer: &Tokenizer) -> Result<ParserFactory, String> {
        let n_tokens = u32::try_from(self.n_tokens).map_err(|error| error.to_string())?;
        let Some(end) = self.stop_tokens.first() else {
            return Err("no token of the model ends a text".to_owned());
        };
        let words: Vec<Vec<u8>> = (0..n_tokens).map(|id| word(id, tokenizer)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(n_tokens, *end), &words);
        let known = self.stop_tokens.iter().filter(|id| **id < n_tokens);
        let ends: Vec<u32> = known.copied().collect();
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.with_eos_tokens(&ends)));
        let factory = ParserFactory::new_simple(&environment);
        let mut factory = factory.map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = SCHEMA_FUEL;
        limits.max_grammar_size = SCHEMA_SYMBOLS;
        limits.max_lexer_states = LEXER_STATES;
        limits.verbose_errors = false;
        Ok(factory)
    }
}

/// The bytes of a token; what no text has is marked, and what no token is, is nothing.
fn word(id: u32, tokenizer: &Tokenizer) -> Vec<u8> {
    if id as usize >= tokenizer.vocab_size() {
        return Vec::new();
    }
    let bytes = tokenizer.token_bytes(id);
    match tokenizer.is_special(id) {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        false => bytes.to_vec(),
    }
}

/// Any object.
pub(crate) fn any_object() -> Value {
    json!({"type": "object"})
}

/// An answer that is held to a form.
pub(crate) struct Held {
    matcher: Matcher,
}

impl Constraint for Held {
    fn allow(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| error.to_string())?;
        for (token, logit) in (0u32..).zip(logits) {
            if !mask.is_allowed(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        let accepted = self.matcher.consume_token(token);
        accepted.map_err(|error| error.to_string())?;
        Ok(self.matcher.is_stopped())
    }
}

#[cfg(test)]
mod tests {
    use cadre_testkit::tiny_tokenizer_json;

    use super::*;

    fn grammars() -> (Grammars, Tokenizer) {
        let tokenizer = Tokenizer::from_json("t", &tiny_tokenizer_json(384).unwrap()).unwrap();
        // More logits than tokens, as models have.
        (Grammars::new(400, Arc::new([0])), tokenizer)
    }

    /// Whether the tokens of `text` are allowed, one after the other, and then the end.
    fn allows(schema: Value, text: &str) -> bool {
        let (grammars, tokenizer) = grammars();
        let mut held = grammars.json(schema, &tokenizer).unwrap();
        for token in tokenizer.encode(text).unwrap() {
            let mut logits = vec![0.0; 400];
            held.allow(&mut logits).unwrap();
            if logits[token as usize] != 0.0 {
                return false;
            }
            assert!(
                logits[390..]
                    .iter()
                    .all(|logit| *logit == f32::NEG_INFINITY)
            );
            held.accept(token).unwrap();
        }
        let mut logits = vec![0.0; 400];
        held.allow(&mut logits).unwrap();
        logits[0] == 0.0
    }

    #[test]
    fn only_what_fits_is_allowed() {
        assert!(allows(any_object(), r#"{"a": [1, "x"], "b": null}"#));
        assert!(allows(any_object(), "{}"));
        for text in ["[]", "{", r#"{"a": 1}}"#, "hello", "<|endoftext|>"] {
            assert!(!allows(any_object(), text), "{text}");
        }
        let schema = json!({"type": "object", "required": ["n"], "additionalProperties": false,
            "properties": {"n": {"type": "integer"}, "s": {"enum": ["x", "y"]}}});
        assert!(allows(schema.clone(), r#"{"n": 12, "s": "y"}"#));
        assert!(!allows(schema.clone(), r#"{"n": "a"}"#));
        assert!(!allows(schema.clone(), r#"{"s": "x"}"#));
        assert!(!allows(schema, r#"{"n": 1, "s": "z"}"#));
    }

    #[test]
    fn what_is_no_schema_is_said() {
        let (grammars, tokenizer) = grammars();
        for schema in [
            json!({"type": "king"}),
            json!({"$ref": "#/nowhere"}),
            json!(7),
        ] {
            assert!(
                grammars.json(schema.clone(), &tokenizer).is_err(),
                "{schema}"
            );
        }
        let nameless = Grammars::new(400, Arc::new([]));
        assert!(nameless.json(any_object(), &tokenizer).is_err());
    }
}
