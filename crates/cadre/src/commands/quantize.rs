//! `cadre quantize`: a model as a quantised GGUF file, by the types of llama-quantize.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use cadre_checkpoint::{
    Checkpoint, ConvertOptions, ConvertTo, Dtype, Importance, QuantizeOptions, TargetDtype,
};

use crate::cli::App;
use crate::commands::convert;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Out, bytes};

/// The names of the matrices that single flags are about.
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// Arguments of `cadre quantize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Type of the file, as llama-quantize names it: Q4_K_M, Q8_0, MXFP4_MOE, ... It says the format of every matrix;
    /// norms, biases and routers stay as they are.
    #[arg(value_name = "TYPE", value_parser = TargetDtype::parse_quantize)]
    kind: TargetDtype,
    /// File to write, whose name ends in .gguf. It must not exist. When interrupted, the same command goes on.
    #[arg(short, long, value_name = "FILE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Importance matrix made by llama-imatrix (GGUF or .dat): errors count as much as the inputs that they meet.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Format of single tensors, as NAME=FORMAT: names of the output, in which * stands for anything, such as
    /// 'blk.*.ffn_down_exps.weight=q6_k'. May be given several times; the first that fits counts. Routers take no less
    /// than 8 bits.
    #[arg(long = "tensor-type", value_name = "NAME=FORMAT", value_parser = parse_tensor_type)]
    tensor_types: Vec<(String, Dtype)>,
    /// Format of the output head; without one of its own, that of the embedding.
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    output_tensor_type: Option<Dtype>,
    /// Format of the embedding.
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    token_embedding_type: Option<Dtype>,
    /// The one format of the type for all matrices, without its exceptions.
    #[arg(long)]
    pure: bool,
    /// Also put matrices that are quantised already into another block format, which loses more than doing it once.
    #[arg(long)]
    allow_requantize: bool,
    /// Write even what llama.cpp computes otherwise from the file; the differences are listed.
    #[arg(long)]
    allow_differences: bool,
    /// Largest part of the file, such as 5GB or 500MB; larger ones are split. Without it, one file.
    #[arg(long, value_name = "SIZE", value_parser = convert::parse_size)]
    max_shard_size: Option<u64>,
    /// Say the formats and the size, and write nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Plans, shows what is special about it, and writes.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let name = args.output.clone().unwrap_or_else(|| "model.gguf".into());
    if !matches!(convert::target(&name, None), ConvertTo::Gguf { .. }) {
        let text = format!("{} does not end in .gguf", name.display());
        return Err(Failure::usage(text)
            .hint(
                "quantised models are GGUF files; `cadre convert` writes folders in plain formats",
            )
            .into());
    }
    let checkpoint = args.checkpoint.open(app)?;
    let options = ConvertOptions {
        target: ConvertTo::Gguf {
            max_part_bytes: args.max_shard_size,
        },
        dtype: args.dtype(),
        allow_differences: args.allow_differences,
        quantize: args.quantize(&checkpoint)?,
    };
    if !args.dry_run {
        return convert::planned(app, &checkpoint, &name, options);
    }
    let conversion = convert::plan(&checkpoint, &name, options)?;
    let mut out = Out::new();
    out.write(&convert::formats(&conversion))?;
    out.write(&format!(
        "{} of {}\n",
        bytes(conversion.n_bytes()),
        bytes(checkpoint.data_bytes())
    ))?;
    out.finish()
}

impl Args {
    fn dtype(&self) -> TargetDtype {
        match self.kind {
            TargetDtype::Mix(mixture) if self.pure => TargetDtype::Is(mixture.base()),
            kind => kind,
        }
    }

    fn quantize(&self, checkpoint: &Checkpoint) -> Result<QuantizeOptions> {
        let importance = self.imatrix.as_deref().map(Importance::open).transpose()?;
        let head = match checkpoint.config().tie_word_embeddings {
            true => EMBEDDING,
            false => HEAD,
        };
        let named = [
            (EMBEDDING, self.token_embedding_type),
            (head, self.output_tensor_type),
        ];
        let named = named
            .into_iter()
            .filter_map(|(name, format)| Some((name.to_owned(), format?)));
        let mut formats: Vec<(String, Dtype)> = named.collect();
        if formats.len() == 2 && formats[0].0 == formats[1].0 {
            return Err(Failure::usage(
                "the output head of this model is its embedding: pass --token-embedding-type or --output-tensor-type",
            )
            .into());
        }
        formats.extend(self.tensor_types.iter().cloned());
        Ok(QuantizeOptions {
            importance: importance.map(Arc::new),
            formats,
            experts: BTreeMap::new(),
            only_plain: !self.allow_requantize,
        })
    }
}

pub(crate) fn parse_format(text: &str) -> Result<Dtype, String> {
    let written = || Dtype::all().filter(|format| format.can_encode());
    let found = written().find(|format| format.name().eq_ignore_ascii_case(text));
    found.ok_or_else(|| {
        let names: Vec<&str> = written().map(Dtype::name).collect();
        format!(
            "`{text}` is no format that is written; known: {}",
            names.join(", ")
        )
    })
}

fn parse_tensor_type(text: &str) -> Result<(String, Dtype), String> {
    let (name, format) = text
        .split_once('=')
        .ok_or("expected NAME=FORMAT, such as 'blk.*.ffn_down_exps.weight=q6_k'")?;
    Ok((name.to_owned(), parse_format(format)?))
}
