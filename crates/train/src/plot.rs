//! Pictures of training logs: reads the JSONL of one or more runs and draws their curves to SVG or PNG.
//!
//! No system font is needed: text is measured, and in PNG drawn, with DejaVu Sans from the crate of that name. An SVG
//! names that font and falls back to the reader's.

mod canvas;
mod compare;
mod panels;
mod read;

pub use compare::{RunSummary, WorstLayer, compare};

use canvas::Canvas;
use panels::Figure;
use plotters::prelude::{BitMapBackend, DrawingAreaErrorKind, IntoDrawingArea, SVGBackend};
use plotters::style::{FontStyle, register_font};
use std::path::{Path, PathBuf};

/// PNG pixels per unit of the layout, for screens with dense pixels.
const PNG_SCALE: u32 = 2;
/// Pixels drawn per pixel written, each way: averaging them smooths edges.
const PNG_SAMPLES: u32 = 2;
/// Plotters rounds coordinates to whole units; drawn larger and scaled back, SVG lines keep their precision.
const SVG_SCALE: u32 = 8;

/// Why a log cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlotError {
    /// No run was given.
    #[error("no training log to plot; name at least one")]
    NoRuns,
    /// A log cannot be read.
    #[error("cannot read the training log {}; a run keeps its log in log.jsonl of its output folder", path.display())]
    Read {
        /// The log.
        path: PathBuf,
        /// Reason from the operating system.
        source: std::io::Error,
    },
    /// A line is not a record.
    #[error("{} line {line}: {problem}; expected the record of a step or of an evaluation, as cadre train writes them", path.display())]
    Line {
        /// The log.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A log without steps.
    #[error("{} holds no training step yet, there is nothing to plot; wait for the first step", path.display())]
    Empty {
        /// The log.
        path: PathBuf,
    },
    /// The output's extension is not a known format.
    #[error("cannot tell the picture format of {} from its extension; expected .svg or .png", path.display())]
    Format {
        /// The output.
        path: PathBuf,
    },
    /// The picture cannot be written.
    #[error("cannot write {}; nothing half-written was left behind", path.display())]
    Write {
        /// The output.
        path: PathBuf,
        /// Reason, with the file system's under it.
        source: Box<crate::TrainError>,
    },
    /// The drawing library failed.
    #[error("drawing failed: {0}")]
    Draw(String),
}

/// Draws the logs of `runs`, each a name and the path of its JSONL, over one another to `out` (`.svg` or `.png`).
///
/// One run shows its held-out loss by domain and its routing by layer; several show the means of those. A last line
/// that is still being written is left out. The file appears completely or not at all.
///
/// # Errors
/// Everything in [`PlotError`]; the output's extension is checked before any log is read.
pub fn draw(runs: &[(&str, &Path)], out: &Path) -> Result<(), PlotError> {
    let format = Format::of(out)?;
    if runs.is_empty() {
        return Err(PlotError::NoRuns);
    }
    let histories: Vec<_> = runs
        .iter()
        .map(|(name, path)| read::history(name, path))
        .collect::<Result<_, _>>()?;
    let bytes = format.render(&panels::figure(&histories))?;
    crate::files::write_atomic(out, &bytes).map_err(|source| PlotError::Write {
        path: out.to_owned(),
        source: Box::new(source),
    })
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Svg,
    Png,
}

impl Format {
    fn of(path: &Path) -> Result<Self, PlotError> {
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "svg" => Ok(Self::Svg),
            "png" => Ok(Self::Png),
            _ => Err(PlotError::Format {
                path: path.to_owned(),
            }),
        }
    }

    fn render(self, figure: &Figure) -> Result<Vec<u8>, PlotError> {
        register_font(canvas::FONT, FontStyle::Normal, dejavu::sans::regular())
            .map_err(|_| PlotError::Draw("the built-in font is damaged".to_owned()))?;
        match self {
            Self::Svg => svg(figure),
            Self::Png => png(figure),
        }
    }
}

fn svg(figure: &Figure) -> Result<Vec<u8>, PlotError> {
    let (width, height) = canvas::size(figure);
    let drawn = (width * SVG_SCALE, height * SVG_SCALE);
    let mut text = String::new();
    Canvas::new(
        SVGBackend::with_string(&mut text, drawn).into_drawing_area(),
        SVG_SCALE,
    )
    .figure(figure)
    .map_err(failure)?;
    let attributes = |(w, h)| format!("width=\"{w}\" height=\"{h}\"");
    Ok(text
        .replacen(&attributes(drawn), &attributes((width, height)), 1)
        .into_bytes())
}

fn png(figure: &Figure) -> Result<Vec<u8>, PlotError> {
    let scale = PNG_SCALE * PNG_SAMPLES;
    let (width, height) = canvas::size(figure);
    let drawn = (width * scale, height * scale);
    let mut pixels = vec![0; drawn.0 as usize * drawn.1 as usize * 3];
    Canvas::new(
        BitMapBackend::with_buffer(&mut pixels, drawn).into_drawing_area(),
        scale,
    )
    .figure(figure)
    .map_err(failure)?;
    let pixels = averaged(&pixels, drawn.0 as usize);
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width * PNG_SCALE, height * PNG_SCALE);
    encoder.set_color(png::ColorType::Rgb);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(&pixels))
        .map_err(|e| PlotError::Draw(e.to_string()))?;
    Ok(out)
}

fn failure<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> PlotError {
    PlotError::Draw(error.to_string())
}

/// Means of squares of `PNG_SAMPLES` RGB pixels, rows of `width`.
fn averaged(pixels: &[u8], width: usize) -> Vec<u8> {
    let n = PNG_SAMPLES as usize;
    let mut out = Vec::with_capacity(pixels.len() / (n * n));
    for rows in pixels.chunks_exact(n * width * 3) {
        for x in (0..width * 3).step_by(n * 3) {
            for channel in 0..3 {
                let samples = (0..n)
                    .flat_map(|row| (0..n).map(move |i| row * width * 3 + x + i * 3 + channel));
                let sum: u32 = samples.map(|at| u32::from(rows[at])).sum();
                out.push((sum / (PNG_SAMPLES * PNG_SAMPLES)) as u8);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A log of `n_steps` steps, `n_layers` MoE layers and an evaluation of two domains every ten steps.
    fn log(n_steps: u64, n_layers: usize) -> String {
        let mut text = String::new();
        for step in 1..=n_steps {
            let layers: Vec<String> = (0..n_layers)
                .map(|l| {
                    format!(
                        r#"{{"layer":{l},"cv":0.{l}1,"max_vio":1.{l},"dead":{l},"entropy":2.0}}"#
                    )
                })
                .collect();
            let loss = 8.0 / (step as f64).sqrt();
            text += &format!(
                r#"{{"step":{step},"tokens":{},"loss":{loss},"cross_entropy":{loss},"balance":1.1,"z":3.0,"lr":0.001,"grad_norm":0.5,"tokens_per_second":3000.0,"seconds":1.5,"layers":[{}]}}"#,
                step * 4096,
                layers.join(",")
            );
            text.push('\n');
            if step % 10 == 0 {
                let score =
                    |nll: f64| format!(r#"{{"tokens":9,"nll":{nll},"perplexity":{}}}"#, nll.exp());
                let (code, prose) = (score(loss), score(loss + 0.1));
                text += &format!(
                    "{{\"step\":{step},\"eval\":{{\"code\":{code},\"prose\":{prose}}}}}\n"
                );
            }
        }
        text
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn log(&self, name: &str, text: &str) -> PathBuf {
            fs::write(self.path(name), text).unwrap();
            self.path(name)
        }

        fn entries(&self) -> usize {
            fs::read_dir(self.0.path()).unwrap().count()
        }
    }

    fn svg_of(runs: &[(&str, &Path)], folder: &Folder) -> String {
        let out = folder.path("out.svg");
        draw(runs, &out).unwrap();
        fs::read_to_string(out).unwrap()
    }

    #[test]
    fn svg_shows_every_panel_domain_and_run() {
        let folder = Folder::new();
        let moe = folder.log("moe.jsonl", &log(40, 3));
        let dense = folder.log("dense.jsonl", &log(700, 0));
        let one = svg_of(&[("tiny", &moe)], &folder);
        for text in [
            "tiny",
            "40 steps",
            "training",
            "code",
            "prose",
            "Learning rate",
            "Load CV",
            "entropy",
        ] {
            assert!(one.contains(text), "{text} is missing");
        }
        assert!(one.starts_with("<svg width=\"1440\""));
        let dense_alone = svg_of(&[("dense", &dense)], &folder);
        assert!(
            !dense_alone.contains("Load CV"),
            "a dense model has no routing to show"
        );
        let both = svg_of(&[("moe run", &moe), ("dense run", &dense)], &folder);
        for text in ["2 runs", "moe run", "dense run", "mean over layers"] {
            assert!(both.contains(text), "{text} is missing");
        }
    }

    #[test]
    fn png_has_the_size_of_the_layout_and_ink() {
        let folder = Folder::new();
        let (path, out) = (folder.log("log.jsonl", &log(1, 2)), folder.path("out.PNG"));
        draw(&[("one step", &path)], &out).unwrap();
        let decoder = png::Decoder::new(std::io::BufReader::new(fs::File::open(&out).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(info.width, 2 * 1440);
        assert!(pixels.iter().any(|&p| p < 80), "there is text");
        assert_eq!(folder.entries(), 2);
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_others_are_errors() {
        let folder = Folder::new();
        let mut text = log(12, 1);
        text.push_str("{\"step\":13,\"tok");
        let path = folder.log("log.jsonl", &text);
        assert!(svg_of(&[("run", &path)], &folder).contains("12 steps"));
        text.push('\n');
        let path = folder.log("log.jsonl", &text);
        let message = draw(&[("run", &path)], &folder.path("x.svg"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("log.jsonl line 14: "), "{message}");
        assert!(!folder.path("x.svg").exists());
    }

    #[test]
    fn each_refusal_says_what_is_wrong() {
        let folder = Folder::new();
        let empty = folder.log("empty.jsonl", "");
        let wrong = folder.log("wrong.jsonl", "{\"step\":1}\n");
        let good = folder.log("good.jsonl", &log(2, 1));
        let message = |runs: &[(&str, &Path)], out: &str| {
            draw(runs, &folder.path(out)).unwrap_err().to_string()
        };
        assert!(message(&[("a", &empty)], "a.svg").contains("empty.jsonl holds no training step"));
        let missing_field = message(&[("a", &wrong)], "a.svg");
        assert!(
            missing_field.contains("line 1: missing field `tokens`"),
            "{missing_field}"
        );
        assert!(message(&[("a", &good)], "a.gif").contains("expected .svg or .png"));
        assert!(message(&[("a", &good)], "none/a.svg").contains("cannot write"));
        assert!(message(&[("a", &folder.path("no.jsonl"))], "a.svg").contains("no.jsonl"));
        assert!(message(&[], "a.svg").contains("no training log"));
        assert_eq!(folder.entries(), 3);
    }

    #[test]
    fn averaging_pixels_halves_both_sides() {
        let row = |values: [u8; 4]| {
            values
                .iter()
                .flat_map(|&v| [v, 0, 2 * v])
                .collect::<Vec<u8>>()
        };
        let pixels = [row([0, 4, 8, 8]), row([4, 8, 8, 8])].concat();
        assert_eq!(averaged(&pixels, 4), [4, 0, 8, 8, 0, 16]);
    }
}
