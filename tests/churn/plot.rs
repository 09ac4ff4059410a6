//! The plot: refusals against load, a line per policy.

use std::sync::Arc;

use kuva::{
    backend::svg::SvgBackend,
    plot::{LegendPosition, LinePlot},
    render::{
        layout::{Layout, TickFormat},
        plots::Plot,
        render::render_multiple,
    },
};

/// The plot as SVG. Each line has a name and points, which are a load and a share of refused peers in percent.
pub fn refusals(lines: &[(&str, Vec<(f64, f64)>)]) -> String {
    // The palette of Okabe and Ito, which the colour-blind can tell apart.
    let colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
    let plots: Vec<_> = lines
        .iter()
        .zip(colours)
        .map(|((name, points), colour)| {
            let line = LinePlot::new().with_data(points.iter().copied());
            let line = line.with_color(colour).with_stroke_width(2.5);
            Plot::Line(line.with_legend(*name))
        })
        .collect();
    let percent = || TickFormat::Custom(Arc::new(|value| format!("{value:.0} %")));
    let layout = Layout::auto_from_plots(&plots)
        .with_title("Live peers refused, by load")
        .with_x_label("live clients that want a slot / slots")
        .with_y_label("live peers refused")
        .with_x_tick_format(percent())
        .with_y_tick_format(percent())
        .with_x_tick_step(25.0)
        .with_y_axis_min(0.0)
        .with_y_axis_max(100.0)
        .with_legend_position(LegendPosition::OutsideBottomCenter);
    SvgBackend::default().render_scene(&render_multiple(plots, layout))
}
