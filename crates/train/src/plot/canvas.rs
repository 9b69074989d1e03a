//! Puts a figure on paper: layout, axes, lines and labels, the same for every format.

use super::panels::{Figure, Line, Panel, Row};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Fonts by preference; the first is registered with the drawing library.
pub(super) const FONT: &str = "DejaVu Sans, Verdana, sans-serif";

const WIDTH: u32 = 1440;
const MARGIN: u32 = 28;
/// Title and subtitle.
const HEADER: u32 = 60;
/// A line of names of runs, and how many stand on it.
const LEGEND: u32 = 24;
const LEGEND_COLUMNS: usize = 4;
const LOSS_HEIGHT: u32 = 400;
const HEADING: u32 = 40;
const PANEL_HEIGHT: u32 = 220;
const GAP: u32 = 20;
/// Room for labels at the right end of the loss panel's lines.
const END_LABELS: u32 = 120;
const LINE_HEIGHT: i32 = 16;

const INK: RGBColor = RGBColor(30, 41, 59);
const MUTED: RGBColor = RGBColor(100, 116, 139);
const GRID: RGBColor = RGBColor(232, 236, 242);
const AXIS: RGBColor = RGBColor(203, 213, 225);

/// Success, or the backend's failure.
type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Width and height of the figure in layout units.
pub(super) fn size(figure: &Figure) -> (u32, u32) {
    let rows = figure.rows.len() as u32 * (HEADING + PANEL_HEIGHT);
    (WIDTH, header_height(figure) + LOSS_HEIGHT + rows + MARGIN)
}

fn header_height(figure: &Figure) -> u32 {
    HEADER + figure.runs.len().div_ceil(LEGEND_COLUMNS) as u32 * LEGEND
}

/// A drawing area with `scale` of its units to one of the layout.
pub(super) struct Canvas<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    scale: u32,
}

impl<DB: DrawingBackend> Canvas<DB> {
    pub(super) fn new(area: DrawingArea<DB, Shift>, scale: u32) -> Self {
        Self { area, scale }
    }

    pub(super) fn figure(&self, figure: &Figure) -> Drawn<DB> {
        self.area.fill(&WHITE)?;
        self.header(figure)?;
        let width = WIDTH - 2 * MARGIN;
        let mut top = header_height(figure);
        let loss = self.part((MARGIN, top), (width, LOSS_HEIGHT));
        loss.panel(&figure.loss, END_LABELS)?;
        top += LOSS_HEIGHT;
        for row in &figure.rows {
            self.part((MARGIN, top), (width, HEADING + PANEL_HEIGHT))
                .row(row, width)?;
            top += HEADING + PANEL_HEIGHT;
        }
        self.area.present()
    }

    /// The rectangle at `at` of `size`, in layout units.
    fn part(&self, at: (u32, u32), size: (u32, u32)) -> Self {
        let scaled = |(x, y): (u32, u32)| (x * self.scale, y * self.scale);
        Self {
            area: self.area.clone().shrink(scaled(at), scaled(size)),
            scale: self.scale,
        }
    }

    fn at(&self, x: i32, y: i32) -> (i32, i32) {
        (x * self.scale as i32, y * self.scale as i32)
    }

    fn font(&self, size: u32, colour: RGBColor) -> TextStyle<'static> {
        TextStyle {
            color: colour.to_backend_color(),
            ..(FONT, size * self.scale).into_text_style(&self.area)
        }
    }

    fn text(&self, text: &str, (x, y): (i32, i32), size: u32, colour: RGBColor) -> Drawn<DB> {
        let style = self
            .font(size, colour)
            .pos(Pos::new(HPos::Left, VPos::Center));
        self.area
            .draw(&Text::new(text.to_owned(), self.at(x, y), style))
    }

    /// Width of `text` in layout units.
    fn text_width(
        &self,
        text: &str,
        size: u32,
    ) -> Result<i32, DrawingAreaErrorKind<DB::ErrorType>> {
        let (width, _) = self.area.estimate_text_size(text, &self.font(size, INK))?;
        Ok(width.div_ceil(self.scale) as i32)
    }

    fn block(&self, (x, y): (i32, i32), (w, h): (i32, i32), colour: RGBColor) -> Drawn<DB> {
        let corners = [self.at(x, y), self.at(x + w, y + h)];
        self.area.draw(&Rectangle::new(corners, colour.filled()))
    }

    fn header(&self, figure: &Figure) -> Drawn<DB> {
        let left = MARGIN as i32;
        self.text(&figure.title, (left, 32), 22, INK)?;
        let x = left + self.text_width(&figure.title, 22)? + 20;
        self.text(&figure.subtitle, (x, 34), 14, MUTED)?;
        let column = (WIDTH - 2 * MARGIN) as i32 / LEGEND_COLUMNS as i32;
        for (i, (name, colour)) in figure.runs.iter().enumerate() {
            let x = left + (i % LEGEND_COLUMNS) as i32 * column;
            let y = (HEADER + (i / LEGEND_COLUMNS) as u32 * LEGEND) as i32;
            self.block((x, y - 2), (22, 4), *colour)?;
            self.text(&self.fitted(name, column - 50)?, (x + 30, y), 14, INK)?;
        }
        Ok(())
    }

    /// As much of `text` as is no wider than `width`.
    fn fitted(
        &self,
        text: &str,
        width: i32,
    ) -> Result<String, DrawingAreaErrorKind<DB::ErrorType>> {
        let mut fitted = text.to_owned();
        while self.text_width(&fitted, 14)? > width {
            let shorter: String = fitted
                .chars()
                .take(fitted.chars().count().saturating_sub(4))
                .collect();
            fitted = shorter + "...";
        }
        Ok(fitted)
    }

    fn row(&self, row: &Row, width: u32) -> Drawn<DB> {
        let middle = HEADING as i32 / 2 + 4;
        self.text(row.heading, (0, middle), 16, INK)?;
        let mut x = self.text_width(row.heading, 16)? + 20;
        if let [(first, _), .., (last, _)] = row.layers.as_slice() {
            let cell = (120 / row.layers.len() as i32).clamp(2, 20);
            self.text(&first.to_string(), (x, middle), 12, MUTED)?;
            x += self.text_width(&first.to_string(), 12)? + 8;
            for (_, colour) in &row.layers {
                self.block((x, middle - 4), (cell, 8), *colour)?;
                x += cell;
            }
            self.text(&last.to_string(), (x + 8, middle), 12, MUTED)?;
        }
        let n = row.panels.len() as u32;
        let each = (width - (n - 1) * GAP) / n;
        for (i, panel) in (0..n).zip(&row.panels) {
            self.part((i * (each + GAP), HEADING), (each, PANEL_HEIGHT))
                .panel(panel, 8)?;
        }
        Ok(())
    }

    fn panel(&self, panel: &Panel, right: u32) -> Drawn<DB> {
        self.text(panel.title, (0, 12), 13, MUTED)?;
        let ((x0, x1), (y0, y1)) = (x_range(panel), y_range(panel));
        let (width, height) = self.area.dim_in_pixel();
        let rows = (height / self.scale / 55) as usize;
        let columns = (width / self.scale / 70) as usize;
        let mut chart = ChartBuilder::on(&self.area)
            .margin_top(30 * self.scale)
            .margin_right(right * self.scale)
            .x_label_area_size(26 * self.scale)
            .y_label_area_size(48 * self.scale)
            .build_cartesian_2d(x0..x1, y0..y1)?;
        let thin = |colour: RGBColor| colour.stroke_width(self.scale);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(columns)
            .y_labels(rows)
            .bold_line_style(thin(GRID))
            .light_line_style(TRANSPARENT)
            .axis_style(thin(AXIS))
            .set_all_tick_mark_size(4 * self.scale)
            .label_style(self.font(12, MUTED))
            .x_label_formatter(&|x| {
                if x.fract() == 0.0 {
                    number(*x)
                } else {
                    String::new()
                }
            })
            .y_label_formatter(&|y| number(*y))
            .draw()?;
        let area = chart.plotting_area();
        for line in &panel.lines {
            self.line(area, line, panel.spread)?;
        }
        let (columns, rows) = area.get_pixel_range();
        let (left, top) = self.area.get_base_pixel();
        let corner = [columns.end - left, rows.end - top].map(|x| x / self.scale as i32);
        if right >= END_LABELS {
            self.text("step", (corner[0] + 28, corner[1] + 12), 12, MUTED)?;
        }
        self.end_labels(area, &panel.lines, corner)
    }

    fn line(&self, area: &DrawingArea<DB, Axes>, line: &Line, spread: bool) -> Drawn<DB> {
        let points = &line.points;
        if spread && points.iter().any(|p| p.high > p.low) {
            let over = points.iter().map(|p| (p.step, p.high));
            let under = points.iter().rev().map(|p| (p.step, p.low));
            let outline: Vec<(f64, f64)> = over.chain(under).collect();
            area.draw(&Polygon::new(outline, line.colour.mix(0.14)))?;
        }
        let means: Vec<(f64, f64)> = points.iter().map(|p| (p.step, p.mean)).collect();
        let half = self.scale.div_ceil(2);
        if means.len() == 1 || line.marked {
            for &at in &means {
                let radius = 5 * half;
                area.draw(&Circle::new(at, radius, line.colour.filled()))?;
            }
        }
        area.draw(&PathElement::new(means, line.colour.stroke_width(3 * half)))
    }

    /// Names each line right of the panel, whose lower right corner is given; moved apart where they would overlap.
    fn end_labels(
        &self,
        area: &DrawingArea<DB, Axes>,
        lines: &[Line],
        [edge, floor]: [i32; 2],
    ) -> Drawn<DB> {
        let (_, top) = self.area.get_base_pixel();
        let mut labels: Vec<(i32, &Line)> = lines
            .iter()
            .filter(|line| !line.label.is_empty())
            .filter_map(|line| {
                let last = line.points.last()?;
                let (_, y) = area.map_coordinate(&(last.step, last.mean));
                Some(((y - top) / self.scale as i32, line))
            })
            .collect();
        labels.sort_by_key(|(y, _)| *y);
        let places = spread(
            labels.iter().map(|(y, _)| *y).collect(),
            floor - LINE_HEIGHT / 2,
        );
        for ((_, line), y) in labels.iter().zip(places) {
            self.text(&line.label, (edge + 10, y), 13, line.colour)?;
        }
        Ok(())
    }
}

type Axes =
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>;

/// Moves ascending positions apart to [`LINE_HEIGHT`], none below `floor` as long as there is room.
fn spread(mut y: Vec<i32>, floor: i32) -> Vec<i32> {
    for i in 1..y.len() {
        y[i] = y[i].max(y[i - 1] + LINE_HEIGHT);
    }
    let mut limit = floor;
    for y in y.iter_mut().rev() {
        *y = (*y).min(limit);
        limit = *y - LINE_HEIGHT;
    }
    y
}

fn x_range(panel: &Panel) -> (f64, f64) {
    let steps = panel.lines.iter().flat_map(|l| &l.points).map(|p| p.step);
    // A run starts at step 0 even though its first record is of step 1.
    (0.0, steps.fold(1.0, f64::max))
}

fn y_range(panel: &Panel) -> (f64, f64) {
    let points = || panel.lines.iter().flat_map(|l| &l.points);
    let low = points().map(|p| if panel.spread { p.low } else { p.mean });
    let high = points().map(|p| if panel.spread { p.high } else { p.mean });
    let (low, high) = (
        low.fold(f64::INFINITY, f64::min),
        high.fold(f64::NEG_INFINITY, f64::max),
    );
    if low > high || (panel.from_zero && low == 0.0 && high == 0.0) {
        return (0.0, 1.0);
    }
    let low = if panel.from_zero { low.min(0.0) } else { low };
    // Equal values still need an axis.
    let span = if high > low {
        high - low
    } else {
        high.abs().max(1.0)
    };
    let under = if panel.from_zero && low == 0.0 {
        0.0
    } else {
        0.05 * span
    };
    (low - under, high + 0.05 * span)
}

/// A tick label: at most four digits, with thousands and millions as letters.
pub(super) fn number(x: f64) -> String {
    let trimmed = |x: f64, digits: usize| {
        let text = format!("{x:.digits$}");
        let text = if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.')
        } else {
            &text
        };
        if text == "-0" {
            "0".to_owned()
        } else {
            text.to_owned()
        }
    };
    match x.abs() {
        a if a < 1e-12 => "0".to_owned(),
        a if a < 1e-3 => {
            let text = format!("{x:.1e}");
            text.replacen(".0e", "e", 1)
        }
        a if a < 1.0 => trimmed(x, 4),
        a if a < 1e4 => trimmed(x, 2),
        a if a < 1e6 => format!("{}k", trimmed(x / 1e3, 1)),
        _ => format!("{}M", trimmed(x / 1e6, 2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tick_labels_are_short() {
        for (x, text) in [
            (0.0, "0"),
            (-0.0001, "-1e-4"),
            (0.0003, "3e-4"),
            (0.00015, "1.5e-4"),
            (0.003, "0.003"),
            (0.25, "0.25"),
            (20.0, "20"),
            (2.5, "2.5"),
            (1500.0, "1500"),
            (12_000.0, "12k"),
            (12_500.0, "12.5k"),
            (2_500_000.0, "2.5M"),
        ] {
            assert_eq!(number(x), text);
        }
    }

    #[test]
    fn labels_are_moved_apart_and_stay_above_the_floor() {
        assert_eq!(spread(vec![10, 100], 200), [10, 100]);
        assert_eq!(spread(vec![10, 12, 13], 200), [10, 26, 42]);
        assert_eq!(spread(vec![190, 195], 200), [184, 200]);
        assert_eq!(spread(vec![], 200), [0; 0]);
    }
}
