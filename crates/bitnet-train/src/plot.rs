//! Plots of a training log: losses, evaluations, gradient norms and statistics of the layers.
//!
//! Text in a PNG has an 8 × 8 font that is part of the program, so no system fonts are needed.

use crate::{Error, Result};
use bitnet_formats::replace;
use bitnet_quant::qat::{LayerRecord, LogRecord};
use font8x8::UnicodeFonts;
use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters_backend::text_anchor::{HPos, VPos};
use plotters_backend::{BackendColor, BackendCoord, BackendTextStyle, DrawingErrorKind};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;

/// Width and height of a plot in pixels.
const SIZE: (u32, u32) = (1400, 1000);
/// Largest number of points of a curve; more are averaged.
const POINTS: usize = 700;
/// Width and height of a letter in a PNG.
const LETTER: i32 = 16;

/// One curve of a panel.
struct Curve {
    label: Option<String>,
    points: Vec<(f64, f64)>,
    color: RGBAColor,
    width: u32,
}

struct Panel {
    title: &'static str,
    curves: Vec<Curve>,
}

/// Draws a log as an SVG document.
///
/// # Errors
/// [`Error::Option`] for a log without steps.
pub fn svg(log: &[LogRecord]) -> Result<String> {
    let panels = panels(log)?;
    let mut text = String::new();
    draw(
        SVGBackend::with_string(&mut text, SIZE).into_drawing_area(),
        &panels,
    )
    .map_err(|e| Error::option("plot", "a drawing", e))?;
    Ok(text)
}

/// Draws a log as a PNG file's bytes.
///
/// # Errors
/// As [`svg`].
pub fn png(log: &[LogRecord]) -> Result<Vec<u8>> {
    let panels = panels(log)?;
    let mut canvas = Canvas {
        rgb: vec![255; 3 * SIZE.0 as usize * SIZE.1 as usize],
    };
    let area = (&mut canvas).into_drawing_area();
    draw(area, &panels).map_err(|e| Error::option("plot", "a drawing", e))?;
    let mut bytes = vec![];
    let mut encoder = png::Encoder::new(&mut bytes, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder
        .write_header()
        .map_err(|e| Error::option("plot", "a PNG", e))?;
    writer
        .write_image_data(&canvas.rgb)
        .and_then(|()| writer.finish())
        .map_err(|e| Error::option("plot", "a PNG", e))?;
    Ok(bytes)
}

/// Draws a log into a file, as SVG or PNG by its extension. An earlier file is replaced when the
/// new one is complete.
///
/// # Errors
/// [`Error::Option`] for another extension and for a log without steps, [`Error::File`] if the file
/// cannot be written.
pub fn save(log: &[LogRecord], path: &Path) -> Result<()> {
    let bytes = match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => svg(log)?.into_bytes(),
        Some("png") => png(log)?,
        _ => {
            return Err(Error::option(
                "plot",
                "a file ending in .svg or .png",
                path.display(),
            ));
        }
    };
    Ok(replace::write_file(path, &bytes)?)
}

fn panels(log: &[LogRecord]) -> Result<Vec<Panel>> {
    let (mut loss, mut norm, mut evaluations) = (vec![], vec![], vec![]);
    let mut layers: BTreeMap<&str, Vec<&LayerRecord>> = BTreeMap::new();
    for line in log {
        match line {
            LogRecord::Step(s) => {
                loss.push((s.step as f64, s.loss));
                norm.push((s.step as f64, s.gradient_norm));
            }
            LogRecord::Evaluation(e) => evaluations.push((e.step as f64, e.value)),
            LogRecord::Layer(l) => layers.entry(&l.name).or_default().push(l),
            _ => {}
        }
    }
    if loss.is_empty() {
        return Err(Error::option(
            "log",
            "at least one step",
            format!("{} lines without any", log.len()),
        ));
    }
    let curve = |label: &str, points: Vec<(f64, f64)>, color: RGBColor| Curve {
        label: Some(label.into()),
        points: thinned(points),
        color: color.to_rgba(),
        width: 2,
    };
    let mut losses = vec![curve("loss", loss, BLUE)];
    if !evaluations.is_empty() {
        losses.push(curve("evaluation", evaluations, RED));
    }
    let mut panels = vec![
        Panel {
            title: "loss",
            curves: losses,
        },
        Panel {
            title: "gradient norm",
            curves: vec![curve("all gradients", norm, BLUE)],
        },
    ];
    if !layers.is_empty() {
        panels.push(Panel {
            title: "weights that flipped",
            curves: of_layers(&layers, |l| l.flips),
        });
        panels.push(Panel {
            title: "flips that turned back",
            curves: of_layers(&layers, |l| l.oscillation),
        });
        panels.push(Panel {
            title: "weights that are 0",
            curves: of_layers(&layers, |l| l.dead_zone),
        });
        panels.push(Panel {
            title: "scale",
            curves: of_layers(&layers, |l| l.scale),
        });
    }
    Ok(panels)
}

/// A thin curve for each layer and a thick one for their mean.
fn of_layers(
    layers: &BTreeMap<&str, Vec<&LayerRecord>>,
    value: impl Fn(&LayerRecord) -> f64,
) -> Vec<Curve> {
    let mut sums: BTreeMap<u64, (f64, u64)> = BTreeMap::new();
    let mut curves = vec![];
    for records in layers.values() {
        for record in records {
            let sum = sums.entry(record.step).or_default();
            *sum = (sum.0 + value(record), sum.1 + 1);
        }
        let points = records.iter().map(|r| (r.step as f64, value(r))).collect();
        curves.push(Curve {
            label: None,
            points: thinned(points),
            color: BLACK.mix(0.2),
            width: 1,
        });
    }
    let mean = sums
        .iter()
        .map(|(&step, (sum, n))| (step as f64, sum / *n as f64))
        .collect();
    curves.push(Curve {
        label: Some(format!("mean of {} layers", layers.len())),
        points: thinned(mean),
        color: BLUE.to_rgba(),
        width: 2,
    });
    curves
}

/// At most [`POINTS`] points, each the mean of its neighbours.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let width = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let (x, y) = chunk
            .iter()
            .fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        (x / chunk.len() as f64, y / chunk.len() as f64)
    };
    points.chunks(width).map(mean).collect()
}

fn draw<B: DrawingBackend>(
    area: DrawingArea<B, Shift>,
    panels: &[Panel],
) -> Result<(), Box<dyn std::error::Error>>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let parts = area.split_evenly((panels.len().div_ceil(2), 2));
    for (part, panel) in parts.iter().zip(panels) {
        let points = || panel.curves.iter().flat_map(|c| &c.points);
        let range = |of: fn(&(f64, f64)) -> f64| {
            let (low, high) = points()
                .map(of)
                .filter(|x| x.is_finite())
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| {
                    (a.min(x), b.max(x))
                });
            let margin = if high > low {
                0.03 * (high - low)
            } else {
                0.5 * high.abs().max(1e-3)
            };
            (low - margin)..(high + margin)
        };
        let font = ("sans-serif", f64::from(LETTER)).into_text_style(&area);
        let mut chart = ChartBuilder::on(part)
            .margin(12)
            .caption(panel.title, font.clone())
            .x_label_area_size(30)
            .y_label_area_size(110)
            .build_cartesian_2d(range(|p| p.0), range(|p| p.1))?;
        let labels = |x: &f64| number(*x);
        chart
            .configure_mesh()
            .x_labels(6)
            .y_labels(6)
            .light_line_style(TRANSPARENT)
            .label_style(font.clone())
            .x_label_formatter(&labels)
            .y_label_formatter(&labels)
            .draw()?;
        for curve in &panel.curves {
            let color = curve.color;
            let series = chart.draw_series(LineSeries::new(
                curve.points.iter().copied(),
                color.stroke_width(curve.width),
            ))?;
            if let Some(label) = &curve.label {
                series.label(label).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
                });
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .label_font(font)
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// A number with about three significant digits.
fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if !(1e-3..1e5).contains(&a) => format!("{x:.1e}"),
        a if a >= 100.0 => format!("{x:.0}"),
        a if a >= 1.0 => format!("{x:.2}"),
        _ => format!("{x:.4}"),
    }
}

/// The pixels, row by row.
struct Canvas {
    rgb: Vec<u8>,
}

impl DrawingBackend for &mut Canvas {
    type ErrorType = Infallible;

    fn get_size(&self) -> (u32, u32) {
        SIZE
    }

    fn ensure_prepared(&mut self) -> Result<(), DrawingErrorKind<Infallible>> {
        Ok(())
    }

    fn present(&mut self) -> Result<(), DrawingErrorKind<Infallible>> {
        Ok(())
    }

    fn draw_pixel(
        &mut self,
        (x, y): BackendCoord,
        color: BackendColor,
    ) -> Result<(), DrawingErrorKind<Infallible>> {
        if (0..SIZE.0 as i32).contains(&x) && (0..SIZE.1 as i32).contains(&y) {
            let at = 3 * (y as usize * SIZE.0 as usize + x as usize);
            let new = [color.rgb.0, color.rgb.1, color.rgb.2];
            for (old, new) in self.rgb[at..at + 3].iter_mut().zip(new) {
                *old = (f64::from(*old) + color.alpha * (f64::from(new) - f64::from(*old))).round()
                    as u8;
            }
        }
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(
        &self,
        text: &str,
        _: &S,
    ) -> Result<(u32, u32), DrawingErrorKind<Infallible>> {
        Ok((text.chars().count() as u32 * LETTER as u32, LETTER as u32))
    }

    fn draw_text<S: BackendTextStyle>(
        &mut self,
        text: &str,
        style: &S,
        at: BackendCoord,
    ) -> Result<(), DrawingErrorKind<Infallible>> {
        let width = text.chars().count() as i32 * LETTER;
        let left = match style.anchor().h_pos {
            HPos::Left => at.0,
            HPos::Center => at.0 - width / 2,
            HPos::Right => at.0 - width,
        };
        let top = match style.anchor().v_pos {
            VPos::Top => at.1,
            VPos::Center => at.1 - LETTER / 2,
            VPos::Bottom => at.1 - LETTER,
        };
        let dot = LETTER / 8;
        for (i, letter) in (0..).zip(text.chars()) {
            let rows = font8x8::BASIC_FONTS.get(letter).unwrap_or_default();
            for (y, row) in (0..).zip(rows) {
                for x in (0..8).filter(|x| row >> x & 1 == 1) {
                    for (dx, dy) in (0..dot).flat_map(|dx| (0..dot).map(move |dy| (dx, dy))) {
                        self.draw_pixel(
                            (left + i * LETTER + x * dot + dx, top + y * dot + dy),
                            style.color(),
                        )?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_quant::qat::{Evaluation, TrainingStep};

    fn log() -> Vec<LogRecord> {
        let mut log = vec![];
        for step in 1..=2000u64 {
            let loss = 3.0 * (-(step as f64) / 700.0).exp() + 0.3;
            log.push(LogRecord::Step(TrainingStep {
                step,
                steps: 2000,
                loss,
                gradient_norm: loss * 0.5,
                learning_rate: 0.1,
                units: 1,
                seconds: 0.0,
            }));
            if step % 500 == 0 {
                log.push(LogRecord::Evaluation(Evaluation {
                    step,
                    value: loss + 0.1,
                    best: loss + 0.1,
                }));
                for name in ["a", "b"] {
                    log.push(LogRecord::Layer(LayerRecord {
                        step,
                        name: name.into(),
                        lambda: 1.0,
                        flips: 0.01 * loss,
                        oscillation: 0.001,
                        dead_zone: 0.3,
                        scale: 0.05,
                        scale_drift: 0.0,
                        gradient_norm: 1.0,
                        gradient_variance: 0.1,
                    }));
                }
            }
        }
        log
    }

    #[test]
    fn both_drawings_hold_all_panels() -> Result<()> {
        let text = svg(&log())?;
        for title in [
            "loss",
            "gradient norm",
            "weights that flipped",
            "flips that turned back",
            "weights that are 0",
            "scale",
            "mean of 2 layers",
        ] {
            assert!(text.contains(title), "{title}");
        }
        let bytes = png(&log())?;
        let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes))
            .read_info()
            .unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut rgb).unwrap();
        assert_eq!((info.width, info.height), SIZE);
        let count = |color: [u8; 3]| {
            rgb.as_chunks::<3>()
                .0
                .iter()
                .filter(|p| **p == color)
                .count()
        };
        // The curves, and the letters and axes.
        assert!(count([0, 0, 255]) > 2000 && count([255, 0, 0]) > 200 && count([0, 0, 0]) > 5000);
        Ok(())
    }

    #[test]
    fn without_steps_there_is_nothing_to_draw() {
        assert_eq!(
            svg(&[]).unwrap_err().to_string(),
            "log: expected at least one step, got 0 lines without any"
        );
        let error = save(&log(), Path::new("plot.gif")).unwrap_err().to_string();
        assert_eq!(
            error,
            "plot: expected a file ending in .svg or .png, got plot.gif"
        );
    }
}
