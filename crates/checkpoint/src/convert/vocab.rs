//! The text side of a conversion: the vocabulary and templates in the keys of GGUF, or in the files of a folder.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{CheckpointError, Result};
use crate::gguf::{Array, Gguf, Value};
use crate::text::{
    ChatTemplates, EncodeOptions, GgufVocab, TokenType, Tokenizer, pretokenizer_of, tokenizer_json,
};

/// The whole `tokenizer.json`, where a GGUF file has it.
const HUGGING_FACE: &str = "tokenizer.huggingface.json";

/// Text files of a folder that go into another folder as they are.
const TEXT_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Texts that a vocabulary must cut into the same tokens before it is written: words, numbers, code, other scripts.
const PROBES: &[&str] = &[
    "Hello world, it's 2024!",
    "  spaces\tand\n\nlines  ",
    "fn main() { let x = 12345.678; }",
    "Gr\u{fc}\u{df}e \u{4f60}\u{597d} \u{43f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{1f600}",
];

/// The text files of a folder that go into another as they are.
pub(super) fn kept_files(source: &Checkpoint) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for name in TEXT_FILES {
        if let Some(text) = source.file_text(name)? {
            files.push(((*name).to_owned(), text));
        }
    }
    Ok(files)
}

/// The keys `tokenizer.*` for a GGUF file of `source`.
pub(super) fn entries(
    source: &Checkpoint,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    if let Some(gguf) = source.gguf() {
        let kept = gguf
            .entries()
            .iter()
            .filter(|(key, _)| key.starts_with("tokenizer."));
        return Ok(kept.cloned().collect());
    }
    let Some(text) = source.file_text("tokenizer.json")? else {
        notes.push(
            "the model has no tokenizer.json: the file takes and gives token ids only".to_owned(),
        );
        return Ok(vec![("tokenizer.ggml.model".to_owned(), "no_vocab".into())]);
    };
    let tokenizer = source.tokenizer()?;
    let vocab = vocab_of(source, &text, &tokenizer)?;
    compare(source, &vocab, &tokenizer)?;
    let mut list = vocab_entries(&vocab);
    let templates = source.chat(&tokenizer)?.templates;
    for name in templates.names() {
        let key = match name {
            "default" => "tokenizer.chat_template".to_owned(),
            other => format!("tokenizer.chat_template.{other}"),
        };
        if let Some(template) = templates.source(name) {
            list.push((key, template.into()));
        }
    }
    list.push((HUGGING_FACE.to_owned(), text.into()));
    Ok(list)
}

fn vocab_entries(vocab: &GgufVocab) -> Vec<(String, Value)> {
    let types: Vec<i32> = vocab.token_types.iter().map(|kind| kind.id()).collect();
    let mut list: Vec<(&str, Value)> = vec![
        ("model", vocab.model.as_str().into()),
        ("tokens", Array::of_texts(&vocab.tokens).into()),
        ("token_type", Array::from(&types[..]).into()),
    ];
    if let Some(pre) = &vocab.pre {
        list.insert(1, ("pre", pre.as_str().into()));
    }
    if !vocab.scores.is_empty() {
        list.push(("scores", Array::from(&vocab.scores[..]).into()));
    }
    if !vocab.merges.is_empty() {
        list.push(("merges", Array::of_texts(&vocab.merges).into()));
    }
    for (name, id) in [
        ("bos_token_id", vocab.bos),
        ("eos_token_id", vocab.eos),
        ("eot_token_id", vocab.eot),
        ("unknown_token_id", vocab.unk),
        ("padding_token_id", vocab.pad),
    ] {
        if let Some(id) = id {
            list.push((name, id.into()));
        }
    }
    for (name, flag) in [
        ("add_bos_token", vocab.add_bos),
        ("add_eos_token", vocab.add_eos),
        ("add_space_prefix", vocab.add_space_prefix),
    ] {
        if let Some(flag) = flag {
            list.push((name, flag.into()));
        }
    }
    let keyed = list.into_iter();
    keyed
        .map(|(name, value)| (format!("tokenizer.ggml.{name}"), value))
        .collect()
}

fn fail(source: &Checkpoint, problem: impl Into<String>) -> CheckpointError {
    CheckpointError::Tokenizer {
        origin: format!("{}/tokenizer.json", source.origin()),
        problem: problem.into(),
    }
}

/// The vocabulary of a `tokenizer.json` of the kind BPE: byte-level, or with bytes as a fallback (SentencePiece).
fn vocab_of(source: &Checkpoint, text: &str, tokenizer: &Tokenizer) -> Result<GgufVocab> {
    let json: Json = serde_json::from_str(text).map_err(|error| fail(source, error.to_string()))?;
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        let kind = &model["type"];
        return Err(fail(
            source,
            format!("its model is {kind}; GGUF is written for BPE"),
        ));
    }
    let config = source.config();
    let mut vocab = GgufVocab {
        origin: source.origin().to_owned(),
        model: "gpt2".to_owned(),
        pre: None,
        tokens: (0..config.vocab_size)
            .map(|id| format!("[PAD{id}]"))
            .collect(),
        scores: Vec::new(),
        token_types: vec![TokenType::Unused; config.vocab_size],
        merges: Vec::new(),
        bos: config.bos_token_id,
        eos: None,
        eot: None,
        eom: None,
        unk: None,
        pad: config.pad_token_id,
        add_bos: None,
        add_eos: None,
        add_space_prefix: None,
        strip_after_added: false,
    };
    let is_bytes = model["byte_fallback"].as_bool().unwrap_or(false);
    name_tokens(source, &json, is_bytes, &mut vocab)?;
    let merges = merges(source, model)?;
    if is_bytes {
        vocab.model = "llama".to_owned();
        vocab.scores = scores(&vocab, &merges);
        // "a b" alone tells whether the first word gets a space.
        let ids = tokenizer.encode_with("a", EncodeOptions::TEXT)?;
        let first = ids.first().map(|id| tokenizer.token_str(*id).into_owned());
        vocab.add_space_prefix = Some(first.is_some_and(|token| token.starts_with('\u{2581}')));
    } else {
        vocab.merges = merges
            .into_iter()
            .map(|(a, b)| format!("{a} {b}"))
            .collect();
        let splits = splits(&json["pre_tokenizer"]);
        let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
        let pre = pretokenizer_of(&splits, ignore_merges);
        vocab.pre = Some(pre.map_err(|problem| fail(source, problem))?.to_owned());
    }
    ends(source, tokenizer, &mut vocab)?;
    Ok(vocab)
}

/// Spellings and types by id.
fn name_tokens(
    source: &Checkpoint,
    json: &Json,
    is_bytes: bool,
    vocab: &mut GgufVocab,
) -> Result<()> {
    let too_many = |id: u64| {
        let n = vocab_size_text(source);
        fail(source, format!("token {id} is outside of {n}"))
    };
    let unk = json["model"]["unk_token"].as_str();
    let mut put = |token: &str, id: u64, kind: TokenType| -> Result<()> {
        let at = usize::try_from(id)
            .ok()
            .filter(|at| *at < vocab.tokens.len());
        let at = at.ok_or_else(|| too_many(id))?;
        token.clone_into(&mut vocab.tokens[at]);
        vocab.token_types[at] = kind;
        Ok(())
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let is_byte =
            is_bytes && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        let kind = match () {
            () if is_bytes && Some(token.as_str()) == unk => TokenType::Unknown,
            () if is_byte => TokenType::Byte,
            () => TokenType::Normal,
        };
        put(token, id.as_u64().unwrap_or(u64::MAX), kind)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(text), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
            return Err(fail(source, "an added token has no `content` or `id`"));
        };
        let kind = match token["special"].as_bool() {
            _ if is_bytes && Some(text) == unk => TokenType::Unknown,
            Some(true) => TokenType::Control,
            _ => TokenType::UserDefined,
        };
        put(text, id, kind)?;
    }
    if is_bytes {
        let find = |token: &str| vocab.tokens.iter().position(|known| known == token);
        vocab.unk = unk.and_then(find).and_then(|id| u32::try_from(id).ok());
    }
    Ok(())
}

fn vocab_size_text(source: &Checkpoint) -> String {
    format!("vocab_size = {}", source.config().vocab_size)
}

/// Merges in either spelling: `"a b"` or `["a", "b"]`.
fn merges(source: &Checkpoint, model: &Json) -> Result<Vec<(String, String)>> {
    let one = |merge: &Json| {
        if let Some((a, b)) = merge.as_str().and_then(|text| text.split_once(' ')) {
            return Some((a.to_owned(), b.to_owned()));
        }
        Some((merge[0].as_str()?.to_owned(), merge[1].as_str()?.to_owned()))
    };
    let list = model["merges"].as_array().into_iter().flatten();
    let list: Option<Vec<_>> = list.map(one).collect();
    list.ok_or_else(|| fail(source, "a merge is neither `a b` nor a pair"))
}

/// Scores that make SentencePiece merge in the order of the merges: the first has the best.
fn scores(vocab: &GgufVocab, merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let score = |token: &String| ranks.get(token).map_or(0.0, |rank| -(*rank as f32) - 1.0);
    vocab.tokens.iter().map(score).collect()
}

/// Expressions that a pre-tokenizer splits by, in order.
fn splits(json: &Json) -> Vec<String> {
    if let Some(list) = json["pretokenizers"].as_array() {
        return list.iter().flat_map(splits).collect();
    }
    let regex = || json["pattern"]["Regex"].as_str().map(str::to_owned);
    match json["type"].as_str() {
        Some("Split") => regex().into_iter().collect(),
        Some("Digits") if json["individual_digits"] == true => vec![r"\p{N}".to_owned()],
        Some("ByteLevel") if json["use_regex"] != false => {
            vec![crate::text::GPT2_SPLIT.to_owned()]
        }
        _ => Vec::new(),
    }
}

/// Which tokens bound a text, and whether prompts get them.
fn ends(source: &Checkpoint, tokenizer: &Tokenizer, vocab: &mut GgufVocab) -> Result<()> {
    let chat = source.chat(tokenizer)?;
    let ids = &source.config().eos_token_ids;
    let named = |token: Option<String>| token.and_then(|token| tokenizer.token_id(&token));
    vocab.eos = named(chat.eos_token).or(ids.first().copied());
    vocab.eot = ids.iter().copied().find(|id| Some(*id) != vocab.eos);
    vocab.bos = named(chat.bos_token).or(vocab.bos);
    let bare = tokenizer.encode_with("a", EncodeOptions::RENDERED)?;
    let prompt = tokenizer.encode_with("a", EncodeOptions::PROMPT)?;
    let before = prompt.len() - bare.len();
    let has = |id: Option<u32>, at: Option<&u32>| before > 0 && id.is_some() && id.as_ref() == at;
    vocab.add_bos = Some(has(vocab.bos, prompt.first()));
    vocab.add_eos = Some(has(vocab.eos, prompt.last()));
    Ok(())
}

/// The vocabulary must give the ids of the tokenizer that it was made of.
fn compare(source: &Checkpoint, vocab: &GgufVocab, tokenizer: &Tokenizer) -> Result<()> {
    let made = Tokenizer::from_gguf_vocab(vocab)?;
    for probe in PROBES {
        let (ours, theirs) = (tokenizer.encode(probe)?, made.encode(probe)?);
        if ours != theirs {
            return Err(fail(
                source,
                format!(
                    "GGUF would cut {probe:?} into {theirs:?}, not {ours:?}; its kind cannot be written"
                ),
            ));
        }
    }
    Ok(())
}

/// The text files for a folder of `source`.
pub(super) fn files(
    source: &Checkpoint,
    config: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, String)>> {
    let Some(gguf) = source.gguf() else {
        return kept_files(source);
    };
    let mut files = Vec::new();
    match gguf.text_opt(HUGGING_FACE)? {
        Some(text) => {
            files.push(("tokenizer.json".to_owned(), text.to_owned()));
        }
        None => match made_json(gguf, source) {
            Ok(text) => files.push(("tokenizer.json".to_owned(), text)),
            Err(reason) => notes.push(format!(
                "no tokenizer.json is written ({reason}); copy that of the original model"
            )),
        },
    }
    add_chat(gguf, source, config, &mut files);
    Ok(files)
}

/// A `tokenizer.json` made of the vocabulary, which must cut texts alike.
fn made_json(gguf: &Gguf, source: &Checkpoint) -> Result<String> {
    let vocab = source.vocab(gguf)?;
    let text = tokenizer_json(&vocab)?;
    let (theirs, ours) = (
        Tokenizer::from_gguf_vocab(&vocab)?,
        Tokenizer::from_json(source.origin(), &text)?,
    );
    for probe in PROBES {
        let (theirs, ours) = (theirs.encode(probe)?, ours.encode(probe)?);
        if ours != theirs {
            let problem =
                format!("tokenizer.json would cut {probe:?} into {ours:?}, not {theirs:?}");
            return Err(fail(source, problem));
        }
    }
    Ok(text)
}

/// `chat_template.jinja`, and `tokenizer_config.json` with the tokens that bound a text.
fn add_chat(
    gguf: &Gguf,
    source: &Checkpoint,
    config: &ModelConfig,
    files: &mut Vec<(String, String)>,
) {
    let Ok(vocab) = source.vocab(gguf) else {
        return;
    };
    let texts = gguf
        .entries()
        .iter()
        .filter_map(|(key, value)| match value {
            Value::Text(text) => Some((key.as_str(), text.as_str())),
            _ => None,
        });
    let templates = ChatTemplates::from_gguf(source.origin(), texts);
    if let Some(template) = templates.source("default") {
        files.push(("chat_template.jinja".to_owned(), template.to_owned()));
    }
    let token = |id: Option<u32>| id.and_then(|id| vocab.tokens.get(id as usize));
    let json = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
        "add_bos_token": vocab.add_bos,
        "bos_token": token(vocab.bos),
        "eos_token": token(vocab.eos),
        "pad_token": token(vocab.pad),
    });
    files.push(("tokenizer_config.json".to_owned(), format!("{json:#}\n")));
}
