//! Prometheus counters that differ in one label, and shorthands for prometheus-client.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{TypedMetric, counter::Counter, family::Family},
    registry::{Metric, Registry, Unit},
};

/// The name of a label and its value.
pub type Label = (&'static str, &'static str);

/// Counters that differ in one label.
pub struct Counters {
    label: &'static str,
    family: Family<[Label; 1], Counter>,
}

impl Counters {
    /// Registers them. Those of `values` exist from the start, so that a rate over the first event is right.
    pub fn new(
        registry: &mut Registry,
        name: &str,
        help: &str,
        label: &'static str,
        values: &[&'static str],
    ) -> Self {
        let counters = Self { label, family: registered(registry, name, help) };
        for value in values {
            counters.add(value, 0);
        }
        counters
    }

    /// Adds one to the counter with this value of the label.
    pub fn count(&self, value: &'static str) {
        self.add(value, 1);
    }

    fn add(&self, value: &'static str, more: u64) {
        let labels = [(self.label, value)];
        self.family.get_or_create(&labels).inc_by(more);
    }
}

/// Registers a new metric.
pub fn registered<M: Metric + Clone + Default>(
    registry: &mut Registry,
    name: &str,
    help: &str,
) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Writes a metric whose value is read for the scrape.
pub fn write(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: impl EncodeMetric,
) -> fmt::Result {
    metric.encode(out.encode_descriptor(name, help, unit, metric.metric_type())?)
}

/// Writes metrics that differ in their labels.
pub fn write_each<L: EncodeLabelSet, M: EncodeMetric + TypedMetric>(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metrics: impl IntoIterator<Item = (L, M)>,
) -> fmt::Result {
    let mut family = out.encode_descriptor(name, help, None, M::TYPE)?;
    for (labels, metric) in metrics {
        metric.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
