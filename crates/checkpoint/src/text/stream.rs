//! Turning token ids into text one by one without ever cutting a character in two.

use std::borrow::Cow;

use crate::text::decoding::Lead;
use crate::text::tokenizer::Tokenizer;

/// See [`Tokenizer::stream`]. Bytes of an incomplete character wait for the next token.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: Cow<'a, Tokenizer>,
    opening: Opening,
    held: Vec<u8>,
}

impl<'a> TokenStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, lead: Lead) -> Self {
        Self {
            tokenizer: Cow::Borrowed(tokenizer),
            opening: Opening::new(lead),
            held: Vec::new(),
        }
    }

    /// The same, with a tokenizer of its own, which shares the vocabulary.
    #[must_use]
    pub fn into_owned(self) -> TokenStream<'static> {
        TokenStream {
            tokenizer: Cow::Owned(self.tokenizer.into_owned()),
            opening: self.opening,
            held: self.held,
        }
    }

    /// The text that token `id` completes; empty while a character is incomplete.
    ///
    /// Bytes that can no longer become a character turn into U+FFFD at once.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        let bytes = self.tokenizer.token_bytes(id);
        self.opening.feed(bytes, &mut self.held);
        take_complete(&mut self.held)
    }

    /// What is still held back, at the end of the text; an incomplete character is U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        rest
    }
}

/// Where a text stands with what is cut from its start.
#[derive(Debug)]
pub(crate) struct Opening(Lead);

impl Opening {
    pub(crate) fn new(lead: Lead) -> Self {
        Self(lead)
    }

    /// Appends the bytes of the next token to `text`, without what the start of a text loses.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], text: &mut Vec<u8>) {
        match self.0 {
            Lead::Keep => {}
            Lead::FirstToken => {
                self.0 = Lead::Keep;
                text.extend(bytes.iter().filter(|byte| **byte != b' '));
                return;
            }
            Lead::Strip(c, mut left) => {
                let mut buffer = [0; 4];
                let c_bytes = c.encode_utf8(&mut buffer).as_bytes();
                while left > 0
                    && let Some(rest) = bytes.strip_prefix(c_bytes)
                {
                    bytes = rest;
                    left -= 1;
                }
                self.0 = if left == 0 || !bytes.is_empty() {
                    Lead::Keep
                } else {
                    Lead::Strip(c, left)
                };
            }
        }
        text.extend_from_slice(bytes);
    }
}

/// Removes everything from `held` except a tail that may still become a character.
fn take_complete(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < held.len() {
        match std::str::from_utf8(&held[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = held.len();
            }
            Err(error) => {
                let valid = at + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&held[at..valid]));
                at = valid;
                let Some(invalid) = error.error_len() else {
                    break;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                at += invalid;
            }
        }
    }
    held.drain(..at);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_start_of_a_text_loses_its_space() {
        let mut opening = Opening::new(Lead::Strip(' ', 1));
        let mut text = Vec::new();
        for token in ["", " ", " a", " b"] {
            opening.feed(token.as_bytes(), &mut text);
        }
        assert_eq!(text, b" a b");
        let mut opening = Opening::new(Lead::FirstToken);
        let mut text = Vec::new();
        for token in ["  ", " a"] {
            opening.feed(token.as_bytes(), &mut text);
        }
        assert_eq!(text, b" a");
    }

    #[test]
    fn a_character_in_pieces_comes_out_whole() {
        let mut held = vec![b'a', 0xe2];
        assert_eq!(take_complete(&mut held), "a");
        held.push(0x82);
        assert_eq!(take_complete(&mut held), "");
        held.extend([0xac, b'b']);
        assert_eq!(take_complete(&mut held), "\u{20ac}b");
        assert!(held.is_empty());
    }

    #[test]
    fn impossible_bytes_are_not_held_forever() {
        let mut held = vec![0x80, 0x80];
        assert_eq!(take_complete(&mut held), "\u{fffd}\u{fffd}");
        let mut held = vec![0xe2, b'x'];
        assert_eq!(take_complete(&mut held), "\u{fffd}x");
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_lossy_text(bytes: Vec<u8>, step in 1..5usize) {
            let mut held = Vec::new();
            let mut text = String::new();
            for piece in bytes.chunks(step) {
                held.extend_from_slice(piece);
                text += &take_complete(&mut held);
            }
            text += &String::from_utf8_lossy(&held);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
