//! `cadre logits`: raw logits of token ids, for checking against other engines.

use std::fmt::Write;

use anyhow::{Context, Result};
use cadre_engine::{Logits, Observer, RoutingEvent, SessionOptions};
use serde::Serialize;

use crate::cache::CacheArgs;
use crate::cli::App;
use crate::failure::Failure;
use crate::lossy::Said;
use crate::model::ModelArgs;
use crate::output::{Format, Out};

/// Tokens of one forward pass, so that only that many rows of logits are in memory.
const CHUNK: usize = 64;
/// Tokens listed per position for people.
const N_TOP: usize = 5;

/// Arguments of `cadre logits`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Token ids such as 1,2,3, or @FILE with ids separated by commas or white space.
    #[arg(long, value_name = "IDS")]
    tokens: String,
    /// Only the logits of the last position.
    #[arg(long)]
    last: bool,
    /// Also the picked experts and their weights, per layer and position (with -o json); those of the attention apart.
    #[arg(long)]
    routing: bool,
    /// Form of the result.
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

/// The picks of one layer.
#[derive(Debug, Default, Serialize)]
struct LayerRouting {
    layer: usize,
    /// Per position.
    experts: Vec<Vec<u16>>,
    weights: Vec<Vec<f32>>,
}

/// Collects picks, if they are wanted.
struct Collector {
    wanted: bool,
    layers: Vec<LayerRouting>,
    /// Of the experts of the attention.
    attention: Vec<LayerRouting>,
}

impl Observer for Collector {
    fn routed(&mut self, event: &RoutingEvent<'_>) {
        collect(&mut self.layers, event);
    }

    fn attention_routed(&mut self, event: &RoutingEvent<'_>) {
        collect(&mut self.attention, event);
    }

    fn watches(&self) -> bool {
        self.wanted
    }
}

fn collect(layers: &mut Vec<LayerRouting>, event: &RoutingEvent<'_>) {
    let at = layers.iter().position(|one| one.layer == event.layer);
    let at = at.unwrap_or_else(|| {
        layers.push(LayerRouting {
            layer: event.layer,
            ..LayerRouting::default()
        });
        layers.len() - 1
    });
    for (experts, weights) in event.routing.iter() {
        layers[at].experts.push(experts.to_vec());
        layers[at].weights.push(weights.to_vec());
    }
}

/// Computes and prints, a chunk at a time.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let tokens = read_tokens(&args.tokens)?;
    let mut options = SessionOptions {
        n_ctx: Some(tokens.len()),
        chunk: CHUNK,
        kv: args.cache.formats(),
    };
    let loaded = args.model.load(app, &options)?;
    let model = &*loaded.model;
    let n_ctx = tokens.len().min(model.info().max_context);
    options.n_ctx = Some(n_ctx);
    let n_together = model.info().lossy.chunk(CHUNK);
    let mut session = model.session(&options)?;
    let mut collector = Collector {
        wanted: args.routing,
        layers: Vec::new(),
        attention: Vec::new(),
    };
    let mut printer = Printer {
        out: Out::new(),
        format: args.output,
        n_rows: 0,
        lossy: Said::of(model.info()),
    };
    if tokens.len() > n_ctx {
        let message = format!(
            "{} tokens are more than the context of {n_ctx} tokens",
            tokens.len()
        );
        return Err(Failure::new(message).hint("pass fewer ids").into());
    }
    printer.start(&tokens)?;
    for (at, chunk) in tokens.chunks(n_together).enumerate() {
        app.interrupt.check()?;
        let is_last = (at + 1) * n_together >= tokens.len();
        let want = match (args.last, is_last) {
            (false, _) => Logits::All,
            (true, true) => Logits::Last,
            (true, false) => Logits::None,
        };
        let logits = model.forward(&mut session, chunk, want, &mut collector)?;
        let first = if args.last {
            tokens.len() - 1
        } else {
            at * n_together
        };
        for (row, logits) in logits.chunks(model.info().vocab_size).enumerate() {
            printer.row(first + row, tokens[first + row], logits)?;
        }
    }
    printer.end(args.routing.then_some(&collector))
}

struct Printer {
    out: Out,
    format: Format,
    n_rows: usize,
    lossy: Said,
}

impl Printer {
    fn start(&mut self, tokens: &[u32]) -> Result<()> {
        if self.format == Format::Json {
            self.out.write(&format!(
                "{{\"tokens\":{},\"logits\":[",
                serde_json::to_string(tokens)?
            ))?;
        }
        Ok(())
    }

    fn row(&mut self, position: usize, token: u32, logits: &[f32]) -> Result<()> {
        let text = match self.format {
            Format::Json => {
                let comma = if self.n_rows > 0 { "," } else { "" };
                format!("{comma}{}", serde_json::to_string(logits)?)
            }
            Format::Text => top_line(position, token, logits),
        };
        self.n_rows += 1;
        self.out.write(&text)
    }

    fn end(mut self, routing: Option<&Collector>) -> Result<()> {
        if self.format == Format::Json {
            let routing = match routing {
                Some(Collector {
                    layers, attention, ..
                }) => {
                    let mut text = format!(",\"routing\":{}", serde_json::to_string(layers)?);
                    if !attention.is_empty() {
                        text += ",\"attention_routing\":";
                        text += &serde_json::to_string(attention)?;
                    }
                    text
                }
                None => String::new(),
            };
            let lossy = serde_json::to_string(&self.lossy)?;
            self.out
                .write(&format!("],\"lossy\":{lossy}{routing}}}\n"))?;
        } else if let Some(rules) = self.lossy.rules() {
            self.out.write(&format!("lossy={rules}\n"))?;
        }
        self.out.finish()
    }
}

/// The most probable next tokens of one position.
fn top_line(position: usize, token: u32, logits: &[f32]) -> String {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let mut line = format!("{position:>5} token {token:>6}  next");
    for id in order.into_iter().take(N_TOP) {
        // Writing to a String cannot fail.
        let _ = write!(line, "  {id} ({:.4})", logits[id]);
    }
    line + "\n"
}

/// Ids from the argument, or from the file that it names.
fn read_tokens(argument: &str) -> Result<Vec<u32>> {
    let (text, whence) = match argument.strip_prefix('@') {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            (
                text.with_context(|| format!("cannot read the file of ids {path}"))?,
                path,
            )
        }
        None => (argument.to_owned(), "--tokens"),
    };
    let is_separator = |c: char| c == ',' || c == '[' || c == ']' || c.is_whitespace();
    let words = text.split(is_separator).filter(|word| !word.is_empty());
    let parse = |word: &str| {
        word.parse()
            .map_err(|_| Failure::usage(format!("{whence}: `{word}` is not a token id")))
    };
    let tokens = words.map(parse).collect::<Result<Vec<u32>, _>>()?;
    if tokens.is_empty() {
        return Err(Failure::usage(format!("{whence}: no token ids"))
            .hint("such as 1,2,3")
            .into());
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_in_common_spellings() {
        assert_eq!(read_tokens("1,2, 3").unwrap(), [1, 2, 3]);
        assert_eq!(read_tokens("[7]").unwrap(), [7]);
        assert!(read_tokens("1,x").unwrap_err().to_string().contains("`x`"));
        assert!(read_tokens(" ").is_err());
        assert!(
            read_tokens("@/no/such/file")
                .unwrap_err()
                .to_string()
                .contains("/no/such/file")
        );
    }

    #[test]
    fn the_top_line_is_sorted() {
        let line = top_line(2, 9, &[0.5, 2.0, -1.0]);
        assert_eq!(
            line,
            "    2 token      9  next  1 (2.0000)  0 (0.5000)  2 (-1.0000)\n"
        );
    }
}
