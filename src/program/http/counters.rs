//! Prometheus counters that differ in one label, and shorthands for the library that has them.

use std::sync::atomic::Ordering;

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Metric, Registry},
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

    /// Raises one of them to a count that is kept elsewhere.
    pub fn raise(&self, value: &'static str, to: u64) {
        raise(&self.family.get_or_create(&[(self.label, value)]), to);
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

/// Raises a counter to a count that is kept elsewhere.
pub fn raise(counter: &Counter, to: u64) {
    counter.inner().fetch_max(to, Ordering::Relaxed);
}

/// Sets a gauge to a count.
pub fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}
