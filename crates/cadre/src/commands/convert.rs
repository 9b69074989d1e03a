//! `cadre convert`: a checkpoint as a GGUF file or a Hugging Face folder, in another number format if asked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cadre_checkpoint::{
    Checkpoint, CheckpointError, Conversion, ConvertOptions, ConvertTo, QuantizeOptions,
    TargetDtype,
};

use crate::cli::App;
use crate::failure::Failure;
use crate::model::CheckpointArg;
use crate::output::{Out, bytes, bytes_bar, note};

/// Bytes that must stay free on the disk beside the output.
const RESERVE: u64 = 64 << 20;

/// Arguments of `cadre convert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// What to write: a file whose name ends in .gguf, or else a Hugging Face folder. It must not
    /// exist. An interrupted conversion goes on when the same is run again.
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Format of the matrices: keep, f32, f16, bf16, and for GGUF block formats (q8_0, q4_k, ...) and
    /// mixtures of them (q4_k_m, q5_k_m).
    #[arg(long, value_name = "FORMAT", default_value = "keep", value_parser = TargetDtype::parse)]
    dtype: TargetDtype,
    /// Largest file of a folder or part of a GGUF file, such as 5GB or 500MB. Folders: 5GB. GGUF: no
    /// limit.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_shard_size: Option<u64>,
    /// Write even what the programs that read the output compute otherwise; the differences are listed.
    #[arg(long)]
    allow_differences: bool,
}

/// Converts as the arguments say.
pub(crate) fn run(app: &App, args: &Args) -> Result<()> {
    let checkpoint = args.checkpoint.open(app)?;
    let options = ConvertOptions {
        target: target(&args.output, args.max_shard_size),
        dtype: args.dtype,
        allow_differences: args.allow_differences,
        quantize: QuantizeOptions::default(),
    };
    planned(app, &checkpoint, &args.output, options)
}

/// Plans, shows what is special about it, and writes.
pub(crate) fn planned(
    app: &App,
    checkpoint: &Checkpoint,
    output: &Path,
    options: ConvertOptions,
) -> Result<()> {
    let conversion = plan(checkpoint, output, options)?;
    let paths = write(app, &conversion, output)?;
    let mut out = Out::new();
    for path in paths {
        out.write(&format!("{}\n", path.display()))?;
    }
    out.write(&formats(&conversion))?;
    out.finish()
}

/// Plans and says what is special about it.
pub(crate) fn plan<'a>(
    checkpoint: &'a Checkpoint,
    output: &Path,
    options: ConvertOptions,
) -> Result<Conversion<'a>> {
    let allowed = options.allow_differences;
    let conversion = Conversion::plan(checkpoint, &name(output), options)
        .map_err(|error| hint(error, allowed))?;
    for note in conversion.notes() {
        tracing::warn!("{note}");
    }
    for difference in conversion.differences() {
        tracing::warn!("computed otherwise from the output: {difference}");
    }
    Ok(conversion)
}

/// How many tensors have which format, and the bytes of all, in a line.
pub(crate) fn formats(conversion: &Conversion<'_>) -> String {
    let formats: Vec<String> = conversion
        .formats()
        .into_iter()
        .map(|(dtype, n)| format!("{n} {dtype}"))
        .collect();
    format!(
        "{} tensors: {}\n",
        conversion.n_tensors(),
        formats.join(", ")
    )
}

/// What the name of an output stands for: a file in .gguf, or a folder.
pub(crate) fn target(output: &Path, max_shard_size: Option<u64>) -> ConvertTo {
    match output.extension() {
        Some(extension) if extension == "gguf" => ConvertTo::Gguf {
            max_part_bytes: max_shard_size,
        },
        _ => ConvertTo::Folder {
            max_shard_bytes: max_shard_size.unwrap_or(5_000_000_000),
        },
    }
}

/// Writes with a bar; says how to go on when interrupted.
pub(crate) fn write(app: &App, conversion: &Conversion<'_>, output: &Path) -> Result<Vec<PathBuf>> {
    let there = conversion.unfinished_bytes(output);
    check_space(output, conversion.n_bytes().saturating_sub(there))?;
    let _guard = app.interrupt.guard();
    let what = output.display().to_string();
    let bar = bytes_bar(&app.env, conversion.n_bytes(), what);
    let paths = conversion.write(output, &mut |done| {
        bar.set_position(done);
        !app.interrupt.requested()
    });
    bar.finish_and_clear();
    match paths {
        Err(CheckpointError::Interrupted { path }) => {
            let path = path.display();
            let text = format!("{path} is not complete; run the same again to go on");
            note(&app.env, &text);
            Err(Failure::interrupted().into())
        }
        paths => Ok(paths?),
    }
}

/// The model's name in the metadata: that of the output.
fn name(output: &Path) -> String {
    let stem = output.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

fn hint(error: CheckpointError, allowed: bool) -> anyhow::Error {
    let text = error.to_string();
    if !allowed && text.contains("differences can be allowed") {
        return Failure::new(text)
            .hint("--allow-differences writes it all the same")
            .into();
    }
    error.into()
}

/// Refuses to begin what the disk cannot hold.
fn check_space(output: &Path, n_bytes: u64) -> Result<()> {
    let absolute = std::path::absolute(output)
        .with_context(|| format!("cannot resolve {}", output.display()))?;
    let folder = absolute.ancestors().skip(1).find(|folder| folder.is_dir());
    let Some(folder) = folder else {
        return Ok(());
    };
    let free = fs4::available_space(folder)
        .with_context(|| format!("cannot ask for free space at {}", folder.display()))?;
    if free < n_bytes.saturating_add(RESERVE) {
        return Err(Failure::new(format!(
            "the output needs {} beside {} that stay free, but {} has {}",
            bytes(n_bytes),
            bytes(RESERVE),
            folder.display(),
            bytes(free)
        ))
        .hint("make room there, or write to another disk; nothing was written")
        .into());
    }
    Ok(())
}

/// `5GB`, `500MB`, `2GiB` or plain bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u64)] = &[
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    let upper = text.trim().to_ascii_uppercase();
    let (unit, factor) = UNITS
        .iter()
        .find(|(unit, _)| upper.ends_with(unit))
        .ok_or("expected a size")?;
    let number = upper.trim_end_matches(unit).trim();
    let size = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(*factor));
    size.filter(|size| *size > 0)
        .ok_or_else(|| format!("`{text}` is no size; expected such as 5GB or 500MB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("2 MiB"), Ok(2 << 20));
        assert_eq!(parse_size("123"), Ok(123));
        assert!(
            parse_size("0").is_err() && parse_size("many").is_err() && parse_size("-1GB").is_err()
        );
    }
}
