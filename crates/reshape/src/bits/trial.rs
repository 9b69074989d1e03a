//! Measuring a choice of formats: the model is put together in memory from files that hold all of its experts in one format
//! each, and reads the text.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cadre_checkpoint::Checkpoint;
use cadre_engine::eval::{Document, Windows, perplexity};
use cadre_engine::{LoadOptions, SessionOptions, load};

use super::{Formats, Trial};
use crate::error::{ReshapeError, Result};

/// Runs the model with its experts in several formats over a text.
pub struct Trials<'a> {
    /// The model in every format, the stored one first: paths, and what is open of them.
    files: Vec<(PathBuf, Checkpoint)>,
    documents: &'a [Document],
    window: usize,
    load: LoadOptions,
    /// Hears of every measurement, and of predictions within; stops when it breaks.
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

impl<'a> Trials<'a> {
    /// Of the model that is in `paths` in every format, the stored one first. `progress` hears of the predictions of a
    /// measurement.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn new(
        paths: Vec<PathBuf>,
        (documents, window): (&'a [Document], usize),
        load: LoadOptions,
        progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Self> {
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let checkpoint = Checkpoint::open(&path)?;
            files.push((path, checkpoint));
        }
        Ok(Self {
            files,
            documents,
            window,
            load,
            progress,
        })
    }

    /// The model with experts of several files.
    fn put_together(&self, formats: &Formats) -> Result<Checkpoint> {
        let mut counts = vec![0usize; self.files.len()];
        for format in formats.iter().flatten() {
            counts[*format] += 1;
        }
        let most = (0..counts.len()).max_by_key(|at| counts[*at]).unwrap_or(0);
        let mut whole = Checkpoint::open(&self.files[most].0)?;
        let layers = whole.config().moe.layers.clone();
        for (other, (_, file)) in self.files.iter().enumerate() {
            if other == most || counts[other] == 0 {
                continue;
            }
            let places = layers.iter().zip(formats).flat_map(|(layer, formats)| {
                let experts = formats.iter().enumerate();
                experts.filter_map(move |(id, format)| (*format == other).then_some((*layer, id)))
            });
            whole.take_experts(file, places)?;
        }
        Ok(whole)
    }
}

impl Trial for Trials<'_> {
    fn nll(&mut self, formats: &Formats) -> Result<f64> {
        let model = load(&self.put_together(formats)?, &self.load)?;
        let windows = Windows {
            window: self.window,
            stride: self.window,
            fills_last: false,
        };
        let mut stopped = false;
        let progress = &mut self.progress;
        let kv = SessionOptions::default().kv;
        let result = perplexity(&*model, self.documents, windows, kv, &mut |done, _| {
            let flow = progress(done);
            stopped |= flow.is_break();
            flow
        })?;
        match stopped {
            true => Err(ReshapeError::Stopped),
            false => Ok(result.total.nll()),
        }
    }

    fn change(&mut self, layer: usize, expert: usize, [high, low]: [usize; 2]) -> Result<f64> {
        let pair = [&self.files[high].1, &self.files[low].1];
        let layer = pair[0].config().moe.layers[layer];
        relative_error(pair, layer, expert)
    }
}

/// How far the matrices of an expert of decoder layer `layer` are apart in two files of a model: the root of the squared
/// differences over that of the squares, all three matrices together.
///
/// # Errors
/// A matrix is missing.
pub fn relative_error(
    [before, after]: [&Checkpoint; 2],
    layer: usize,
    expert: usize,
) -> Result<f64> {
    let (mut off, mut all) = (0.0, 0.0);
    for part in ["gate_proj", "up_proj", "down_proj"] {
        let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
        let values = |checkpoint: &Checkpoint| -> Result<Vec<f32>> {
            let view = checkpoint.tensor(&name)?;
            let values = view.to_f32();
            checkpoint.release(&view.bytes);
            Ok(values)
        };
        for (a, b) in values(before)?.into_iter().zip(values(after)?) {
            off += f64::from(a - b).powi(2);
            all += f64::from(a).powi(2);
        }
    }
    Ok(if all > 0.0 { (off / all).sqrt() } else { 0.0 })
}
