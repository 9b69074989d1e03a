//! A fixed text and the small tokenizer trained on it.

use anyhow::Result;
use cadre_checkpoint::train_bpe;

/// Five short passages, one for each kind of text that Cadre's own model knows.
pub const SAMPLE_TEXT: &str = "\
Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. When the \
miller died, the eldest took the mill, the second took the donkey, and the youngest was left \
with the cat. The youngest was sad, for what was he to do with a cat?\n\
fn main() {\n    let total: u32 = (1..=10).map(|n| n * n).sum();\n    if total > 100 {\n        \
return;\n    }\n}\n\
12 + 30 = 42. 7 * 8 = 56. 100 - 64 = 36. If x + 3 = 10 then x = 7.\n\
\"Where are you going?\" asked the miller. \"To the king,\" said the cat. \"And what will you \
say to the king?\" \"That you are a lord.\"\n\
Es war einmal ein M\u{fc}ller, der hatte drei S\u{f6}hne, seine M\u{fc}hle, einen Esel und \
einen Kater. Als der M\u{fc}ller starb, teilten sich die S\u{f6}hne in die Erbschaft.\n";

/// Text of the `tokenizer.json` of a byte-level BPE with at most `vocab_size` tokens, trained on
/// [`SAMPLE_TEXT`]. Id 0 is `<|endoftext|>`.
///
/// # Errors
/// `vocab_size` is below 257.
pub fn tiny_tokenizer_json(vocab_size: usize) -> Result<String> {
    Ok(train_bpe(
        SAMPLE_TEXT.lines(),
        vocab_size,
        &["<|endoftext|>"],
    )?)
}
