//! What the commands that make experts out of a dense model share: where the result goes, and writing it.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cadre_checkpoint::{Checkpoint, TargetDtype, tensor_specs};
use cadre_reshape::{FromDense, MergekitMoe};

use crate::cli::App;
use crate::commands::convert;
use crate::failure::Failure;
use crate::output::{Out, bytes};

/// Where a new model goes.
#[derive(Debug, clap::Args)]
pub(crate) struct OutputArgs {
    /// Folder to write, which must not exist. When interrupted, the same command goes on. `cadre convert` makes a GGUF file
    /// of it.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Format of the matrices: keep (where nothing else is said), f32, f16 or bf16.
    #[arg(long, value_name = "FORMAT", value_parser = TargetDtype::parse)]
    pub(crate) dtype: Option<TargetDtype>,
    /// Largest file of the folder, such as 5GB or 500MB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = convert::parse_size)]
    max_shard_size: u64,
}

impl OutputArgs {
    /// Writes `source` with experts, opens what was written, and says what it is. `asked` is the configuration that asked for
    /// it, if there is one.
    pub(crate) fn write(
        &self,
        app: &App,
        source: &Checkpoint,
        made: &FromDense,
        asked: Option<&MergekitMoe>,
    ) -> Result<()> {
        if self
            .output
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            return Err(Failure::usage("experts are written into a folder")
                .hint(
                    "give the output another name, and make a GGUF file of it with `cadre convert`",
                )
                .into());
        }
        let dtype = self.dtype.or(asked.and_then(MergekitMoe::dtype));
        let dtype = dtype.unwrap_or(TargetDtype::Keep);
        let conversion = made.plan(source, dtype, self.max_shard_size)?;
        if let Some(asked) = asked.filter(|asked| !asked.asks_for(conversion.model_type())) {
            let text = format!(
                "the configuration asks for the architecture {}, but such models become {}",
                asked.architecture(),
                conversion.model_type()
            );
            return Err(Failure::new(text).hint("take `architecture` out").into());
        }
        for note in conversion.notes() {
            tracing::warn!("{note}");
        }
        let paths = convert::write(app, &conversion, &self.output)?;
        let made = Checkpoint::open(paths.first().map_or(Path::new(""), PathBuf::as_path))?;
        made.expect_exactly(&tensor_specs(made.config()))?;
        let moe = &made.config().moe;
        let shared = moe.shared.map_or(String::new(), |shared| {
            format!(" and a shared one of {}", shared.intermediate_size)
        });
        let mut out = Out::new();
        for path in &paths {
            out.write(&format!("{}\n", path.display()))?;
        }
        out.write(&format!(
            "{}: {} layers of {} experts of {} neurons{shared}, {} per token, {} of {}\n",
            made.config().model_type,
            moe.layers.len(),
            moe.n_experts,
            moe.intermediate_size,
            moe.top_k,
            bytes(made.data_bytes()),
            bytes(source.data_bytes())
        ))?;
        out.finish()
    }
}
