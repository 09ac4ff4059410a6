//! The two text formats of `/metrics`: OpenMetrics 1.0 and Prometheus's 0.0.4.
//!
//! Sans-IO. prometheus-client writes OpenMetrics only. Telegraf, promtool and other readers of the older format
//! fail on its type `info`.

use std::fmt::Write;

const OPENMETRICS: &str = "application/openmetrics-text";
const PLAIN: &str = "text/plain";

/// Returns whether an `Accept` header prefers OpenMetrics to the older format (RFC 9110, 12.5.1). OpenMetrics has to be
/// named: a range such as `*/*` means the older one.
pub fn prefers_openmetrics(accept: &str) -> bool {
    let quality = |kind: &str| {
        let qualities = accept.split(',').filter_map(|range| {
            let (range, parameters) = range.split_once(';').unwrap_or((range, ""));
            let is_named = range.trim().eq_ignore_ascii_case(kind);
            let mut parameters = parameters.split(';').map(str::trim);
            let quality = parameters.find_map(|it| it.strip_prefix("q="));
            is_named.then(|| quality.map_or(1.0, |text| text.parse().unwrap_or(0.0)))
        });
        qualities.fold(0.0_f32, f32::max)
    };
    let openmetrics = quality(OPENMETRICS);
    openmetrics > 0.0 && openmetrics >= quality(PLAIN)
}

/// Converts OpenMetrics to Prometheus's text format 0.0.4, which has neither units nor an end mark, nor the type
/// `info`, and in which a counter's metadata has the name of its samples.
pub fn to_prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = "";
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_served_only_if_accepted() {
        for (accept, expected) in [
            // Prometheus 2 and 3, the latter as it is by default; telegraf; curl; a browser.
            (
                "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                true,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                 application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                true,
            ),
            ("text/plain;version=0.0.4;q=0.7,*/*;q=0.3", false),
            ("*/*", false),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", false),
            ("", false),
            ("Application/OpenMetrics-Text", true),
            ("application/openmetrics-text;q=0.4, text/plain;q=0.5", false),
            ("application/openmetrics-text;q=0", false),
            ("application/openmetrics-text;q=soon", false),
        ] {
            assert_eq!(prefers_openmetrics(accept), expected, "{accept}");
        }
    }

    #[test]
    fn the_prometheus_text_format_leaves_out_openmetrics_only_metadata() {
        let openmetrics = "# HELP build The program.\n# TYPE build info\nbuild_info{version=\"1\"} 1\n\
            # HELP sweep_seconds Time.\n# TYPE sweep_seconds counter\n# UNIT sweep_seconds seconds\n\
            sweep_seconds_total 0.5\n# HELP slots Slots.\n# TYPE slots gauge\nslots{state=\"a #b\"} 3\n# EOF\n";
        let expected = "# HELP build_info The program.\n# TYPE build_info gauge\nbuild_info{version=\"1\"} 1\n\
            # HELP sweep_seconds_total Time.\n# TYPE sweep_seconds_total counter\nsweep_seconds_total 0.5\n\
            # HELP slots Slots.\n# TYPE slots gauge\nslots{state=\"a #b\"} 3\n";
        assert_eq!(to_prometheus(openmetrics), expected);
    }
}
