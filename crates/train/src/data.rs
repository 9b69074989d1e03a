//! Text to tokens to batches. The batch of a step depends on the seed and the step alone, so a resumed run
//! sees the same data as one that was never stopped.

use crate::error::{Result, TrainError};
use crate::files;
use crate::init::stream;
use crate::lm::Batch;
use crate::recipe::{Data, Recipe, Source};
use cadre_checkpoint::{Checkpoint, Tokenizer, train_bpe};
use rand::Rng;
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// Ends every document; token 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Bytes of text that the tokenizer is trained on, at most, over all domains.
const TOKENIZER_BYTES: usize = 12 << 20;

#[derive(Deserialize)]
struct Document {
    text: String,
}

/// The tokens of one domain.
#[derive(Debug)]
pub struct Domain {
    /// Name in logs.
    pub name: String,
    /// Documents to train on, each followed by the end-of-text token.
    pub train: Vec<u32>,
    /// Documents never trained on.
    pub heldout: Vec<u32>,
    weight: f64,
}

/// All domains, and the tokenizer made from them.
#[derive(Debug)]
pub struct Corpus {
    /// In the order of the recipe.
    pub domains: Vec<Domain>,
    /// Text of `tokenizer.json`.
    pub tokenizer_json: String,
}

/// Reads the `text` of every line of a JSONL file.
fn read_documents(path: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(files::read(path)?).map_err(|e| TrainError::Document {
        path: path.to_owned(),
        line: 1,
        problem: format!("not UTF-8 ({e})"),
    })?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| {
            serde_json::from_str::<Document>(line)
                .map(|document| document.text)
                .map_err(|e| TrainError::Document {
                    path: path.to_owned(),
                    line: i + 1,
                    problem: e.to_string(),
                })
        })
        .collect()
}

/// The vocabulary of the checkpoint that a run starts from or follows.
struct Given {
    tokenizer_json: String,
    /// The token that ends a text.
    end: Option<u32>,
}

impl Given {
    /// `None` when the run trains a tokenizer of its own.
    fn of(recipe: &Recipe) -> Result<Option<Self>> {
        let from = recipe
            .start
            .as_ref()
            .and_then(|start| start.from.as_deref())
            .or(recipe.cut.as_ref().map(|cut| cut.dense.as_path()));
        let teachers = [
            recipe.distill.as_ref().map(|d| d.teacher.as_path()),
            recipe.router_distill.as_ref().map(|d| d.teacher.as_path()),
        ];
        let teachers = teachers.into_iter().flatten();
        let Some(folder) = from.or_else(|| teachers.clone().next()) else {
            return Ok(None);
        };
        let given = Self::read(folder)?;
        for teacher in teachers.filter(|teacher| *teacher != folder) {
            if same_vocabulary(&given.tokenizer_json, &Self::read(teacher)?.tokenizer_json) {
                continue;
            }
            return Err(TrainError::DoesNotFit {
                path: teacher.to_owned(),
                differences: vec![format!(
                    "its tokenizer is not that of {}, and a teacher has to read the same tokens",
                    folder.display()
                )],
            });
        }
        Ok(Some(given))
    }

    fn read(folder: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let json = files::read(&folder.join("tokenizer.json"))?;
        Ok(Self {
            tokenizer_json: String::from_utf8_lossy(&json).into_owned(),
            end: checkpoint.config().eos_token_ids.first().copied(),
        })
    }
}

/// Whether two `tokenizer.json` give every text the same tokens: equal models and added tokens.
fn same_vocabulary(a: &str, b: &str) -> bool {
    let parts = |text: &str| {
        let json: serde_json::Value = serde_json::from_str(text).ok()?;
        Some([
            json.get("model")?.clone(),
            json.get("added_tokens")?.clone(),
        ])
    };
    parts(a).is_some_and(|a| Some(a) == parts(b))
}

impl Corpus {
    /// Reads the sources, trains the tokenizer (or takes the one of an earlier start of this run, or that of the checkpoint
    /// that the run starts from or follows), and encodes.
    /// `folder` is the run's own and keeps `tokenizer.json` and the tokens.
    ///
    /// # Errors
    /// Unreadable or malformed data, less text than one sequence in a domain, or less than one step in all.
    pub fn prepare(recipe: &Recipe, data: &Data, folder: &Path) -> Result<Self> {
        let tokenizer_file = folder.join("tokenizer.json");
        let given = Given::of(recipe)?;
        let tokenizer_json = match &given {
            Some(given) => {
                files::write_atomic(&tokenizer_file, given.tokenizer_json.as_bytes())?;
                given.tokenizer_json.clone()
            }
            None if tokenizer_file.exists() => {
                String::from_utf8_lossy(&files::read(&tokenizer_file)?).into_owned()
            }
            None => {
                let json = train_tokenizer(data, recipe.model.vocab_size)?;
                files::write_atomic(&tokenizer_file, json.as_bytes())?;
                json
            }
        };
        let origin = tokenizer_file.display().to_string();
        let tokenizer = Tokenizer::from_json(&origin, &tokenizer_json)?;
        let cache = folder.join("tokens");
        files::create_dir(&cache)?;
        let encode = |source: &Source, path: &Path, split: &str| {
            let name = format!("{}.{split}.u32", source.domain);
            let end = given.as_ref().and_then(|given| given.end);
            let end = end.or_else(|| tokenizer.token_id(END_OF_TEXT));
            let reader = Reader {
                tokenizer: &tokenizer,
                end: end.unwrap_or(0),
                // Tokens of another tokenizer are not these tokens.
                crc: crc32fast::hash(tokenizer_json.as_bytes()),
            };
            let tokens = reader.encode_cached(path, &cache.join(name))?;
            if tokens.len() <= recipe.train.seq_len {
                return Err(TrainError::TooLittleData {
                    path: path.to_owned(),
                    n_tokens: tokens.len(),
                    seq_len: recipe.train.seq_len,
                });
            }
            Ok(tokens)
        };
        let domains = data.sources.iter().map(|source| {
            Ok(Domain {
                name: source.domain.clone(),
                train: encode(source, &source.train, "train")?,
                heldout: encode(source, &source.heldout, "heldout")?,
                weight: source.weight,
            })
        });
        let domains = domains.collect::<Result<Vec<_>>>()?;
        let n_tokens = domains.iter().map(|domain| domain.train.len()).sum();
        let n_wanted = recipe.tokens_per_step();
        if n_tokens < n_wanted {
            return Err(TrainError::LessThanBatch { n_tokens, n_wanted });
        }
        Ok(Self {
            domains,
            tokenizer_json,
        })
    }

    /// Micro-batch `micro` of step `step`: every sequence starts at a random place of a random domain.
    #[must_use]
    pub fn batch(&self, recipe: &Recipe, step: u64, micro: usize) -> Batch {
        let seq_len = recipe.train.seq_len;
        let total: f64 = self.domains.iter().map(|d| d.weight).sum();
        let mut rng = stream(recipe.seed, &format!("batch {step} {micro}"));
        let mut tokens = Vec::with_capacity(recipe.train.batch_size * seq_len);
        let mut targets = Vec::with_capacity(tokens.capacity());
        for _ in 0..recipe.train.batch_size {
            let mut at = rng.random::<f64>() * total;
            let domain = self
                .domains
                .iter()
                .find(|domain| {
                    at -= domain.weight;
                    at < 0.0
                })
                .unwrap_or(&self.domains[0]);
            let start = rng.random_range(0..domain.train.len() - seq_len);
            tokens.extend_from_slice(&domain.train[start..start + seq_len]);
            targets.extend_from_slice(&domain.train[start + 1..=start + seq_len]);
        }
        Batch {
            tokens: Arc::new(tokens),
            targets: Arc::new(targets),
            seq_len,
        }
    }
}

/// Consecutive windows of held-out tokens, at most `max_tokens` of them, one sequence per batch entry.
#[must_use]
pub fn windows(tokens: &[u32], seq_len: usize, max_tokens: usize) -> Option<Batch> {
    let n = ((tokens.len() - 1) / seq_len).min((max_tokens / seq_len).max(1));
    (n > 0).then(|| Batch {
        tokens: Arc::new(tokens[..n * seq_len].to_vec()),
        targets: Arc::new(tokens[1..=n * seq_len].to_vec()),
        seq_len,
    })
}

/// Random tokens, for measuring speed without data.
#[must_use]
pub fn random_batch(recipe: &Recipe, step: u64, micro: usize) -> Batch {
    let n = recipe.train.batch_size * recipe.train.seq_len;
    let mut rng = stream(recipe.seed, &format!("random {step} {micro}"));
    let mut ids = || {
        let vocab = recipe.model.vocab_size as u32;
        Arc::new(
            (0..n)
                .map(|_| rng.random_range(0..vocab))
                .collect::<Vec<_>>(),
        )
    };
    Batch {
        tokens: ids(),
        targets: ids(),
        seq_len: recipe.train.seq_len,
    }
}

/// Batches that somebody else has made, to compare runs on the same tokens.
#[derive(Debug)]
pub struct GivenTokens {
    ids: Vec<u32>,
}

impl GivenTokens {
    /// Reads `path`: little-endian u32, for each of `steps` and its micro-batches `batch_size` rows of `seq_len + 1` ids.
    ///
    /// # Errors
    /// A file that is not readable or not of that size, and an id beyond the vocabulary.
    pub fn read(path: &Path, recipe: &Recipe, steps: u64) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| TrainError::io("read", path, e))?;
        let fail = |problem: String| TrainError::Tokens {
            path: path.to_owned(),
            problem,
        };
        let (train, row) = (&recipe.train, recipe.train.seq_len + 1);
        let rows = steps as usize * train.accumulate * train.batch_size;
        let wanted = rows * row * 4;
        if bytes.len() != wanted {
            return Err(fail(format!(
                "{} bytes, expected {wanted}: {rows} rows of {row} ids (u32) for {steps} steps",
                bytes.len()
            )));
        }
        let (words, _) = bytes.as_chunks::<4>();
        let ids: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let vocab = recipe.model.vocab_size;
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(at) => Err(fail(format!(
                "id {} in row {}, but `model.vocab_size` is {vocab}",
                ids[at],
                at / row
            ))),
            None => Ok(Self { ids }),
        }
    }

    /// Micro-batch `micro` of step `step` (from 1).
    ///
    /// # Panics
    /// Beyond the steps that were read.
    #[must_use]
    pub fn batch(&self, recipe: &Recipe, step: u64, micro: usize) -> Batch {
        let (train, row) = (&recipe.train, recipe.train.seq_len + 1);
        let index = (step as usize - 1) * train.accumulate + micro;
        let size = train.batch_size * row;
        let rows = self.ids[index * size..(index + 1) * size].chunks_exact(row);
        let part = |from: usize| {
            let part = |ids: &[u32]| ids[from..from + row - 1].to_vec();
            Arc::new(rows.clone().flat_map(part).collect::<Vec<_>>())
        };
        Batch {
            tokens: part(0),
            targets: part(1),
            seq_len: train.seq_len,
        }
    }
}

/// Trains on an equal share of every domain.
fn train_tokenizer(data: &Data, vocab_size: usize) -> Result<String> {
    let share = TOKENIZER_BYTES / data.sources.len();
    let mut texts = Vec::new();
    for source in &data.sources {
        let mut bytes = 0;
        for document in read_documents(&source.train)? {
            bytes += document.len();
            texts.push(document);
            if bytes >= share {
                break;
            }
        }
    }
    let texts = texts.iter().map(String::as_str);
    Ok(train_bpe(texts, vocab_size, &[END_OF_TEXT])?)
}

/// Makes tokens of text.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    /// Ends every document.
    end: u32,
    /// Of `tokenizer.json`.
    crc: u32,
}

impl Reader<'_> {
    /// Tokens of all documents. The cache is used when it was made from the same tokenizer and the same bytes.
    fn encode_cached(&self, path: &Path, cache: &Path) -> Result<Vec<u32>> {
        let Self {
            tokenizer,
            end,
            crc,
        } = *self;
        let source = std::fs::metadata(path).map_err(|e| TrainError::io("read", path, e))?;
        let key = crc32fast::hash(&files::read(path)?);
        let key = [key, source.len() as u32, crc ^ end];
        if let Ok(bytes) = std::fs::read(cache) {
            let (words, rest) = bytes.as_chunks::<4>();
            let words: Vec<u32> = words.iter().map(|w| u32::from_le_bytes(*w)).collect();
            let (head, tokens) = words.split_at(words.len().min(4));
            let whole = head.len() == 4 && rest.is_empty() && head[3] as usize == tokens.len();
            if whole && head[..3] == key {
                return Ok(tokens.to_vec());
            }
        }
        let documents = read_documents(path)?;
        let texts: Vec<&str> = documents.iter().map(String::as_str).collect();
        let mut tokens = Vec::new();
        for ids in tokenizer.encode_batch(&texts)? {
            tokens.extend(ids);
            tokens.push(end);
        }
        let head = key.iter().copied().chain([tokens.len() as u32]);
        let bytes: Vec<u8> = head
            .chain(tokens.iter().copied())
            .flat_map(u32::to_le_bytes)
            .collect();
        files::write_atomic(cache, &bytes)?;
        Ok(tokens)
    }
}
