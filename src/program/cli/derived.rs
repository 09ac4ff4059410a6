//! The limits that follow from others: from `--memory`, or else from `--max-reservations`.
//!
//! Sans-IO. All limits follow from one number, the size of the relay: how many slots it has unless a flag says otherwise.
//! With `--memory` that is the largest size whose estimate fits into it, so that an explicit limit leaves less for the
//! others. Without, it is `--max-reservations`.

pub mod limit;
pub mod memory_estimate;

use std::cmp::Reverse;

use self::{
    limit::{Derived, KIB, LIMITS, Limit},
    memory_estimate::{MAX_PER_THREAD, MIN_PER_THREAD, Usage, estimate},
};
use crate::program::mux::stream_limits::{DEFAULT_SIZE, buffered, buffered_per_connection, in_kib};

const MIB: usize = 1024 * KIB;

/// The least size without `--memory`: a relay with few slots gets as many connections of unknown peers as any other.
const LEAST_SIZE: usize = 64;

/// How much of `--memory` there is for each thread unless `--threads` says otherwise, in bytes.
const MEMORY_PER_THREAD: u64 = 128 * MIB as u64;

/// The freed memory that threads keep is `--memory` divided by this, at most.
const SHARE_OF_THREADS: u64 = 16;

/// What the limits follow from.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    /// The memory that the relay may take, in bytes.
    pub memory: Option<u64>,
    /// The limits that were set, in the order of [`Limit`].
    pub explicit: [Option<usize>; LIMITS.len()],
    /// What memory depends on besides the limits.
    pub usage: Usage,
}

impl Given {
    /// The limits that follow.
    pub fn derive(&self) -> Derived {
        let slots = self.explicit(Limit::Reservations).unwrap_or(DEFAULT_SIZE);
        match self.memory {
            None => self.of_size(slots.max(LEAST_SIZE)),
            Some(memory) => self.of_size(self.largest_size(memory)),
        }
    }

    /// Checks that the explicit limits fit into the memory.
    ///
    /// # Errors
    ///
    /// The flag that is too much in one line, with the remedy.
    pub fn check(&self) -> Result<(), String> {
        let least = self.least_memory();
        let Some(memory) = self.memory.filter(|memory| *memory < least) else {
            return Ok(());
        };
        let or_more = format!("try {} or more", shown(least));
        // 1. Which of the explicit limits take memory, the most first.
        let mut heavy = Vec::new();
        for (limit, flag) in LIMITS {
            let saved = least.saturating_sub(self.with(limit, None).least_memory());
            if let Some(value) = self.explicit(limit).filter(|_| saved > 0) {
                heavy.push((saved, limit, flag, value));
            }
        }
        heavy.sort_by_key(|(saved, ..)| Reverse(*saved));
        let Some((&(_, limit, flag, value), others)) = heavy.split_first() else {
            let (memory, reason) = (shown(memory), self.usage.reason());
            return Err(format!("--memory {memory}: is too little{reason}; {or_more}"));
        };
        // 2. What to do about the heaviest one.
        let fits = |value| self.with(limit, Some(value)).least_memory() <= memory;
        let remedy = match (largest(1, value, fits), others) {
            (Some(fit), _) => format!("lower it to {}", limit.shown(fit)),
            (None, []) => "leave it out".into(),
            (None, others) => {
                let names: Vec<_> = others.iter().map(|(_, _, flag, _)| *flag).collect();
                format!("lower it and {}", names.join(", "))
            }
        };
        let (value, memory) = (limit.shown(value), shown(memory));
        Err(format!("{flag} {value}: is too much for --memory {memory}; {remedy}, or {or_more}"))
    }

    /// The least memory for the explicit limits, in bytes: whole MiB.
    fn least_memory(&self) -> u64 {
        let memory = Some(u64::MAX);
        let smallest = Self { memory, ..*self }.of_size(1);
        // So little memory is for one thread, unless a flag says otherwise.
        let threads = self.explicit(Limit::Threads).unwrap_or(1) as u64;
        let threads = threads.saturating_mul(MIN_PER_THREAD);
        let others = estimate(&smallest, self.usage, 0);
        let share = others / (SHARE_OF_THREADS - 1) + 1;
        let all = others.saturating_add(share.max(threads));
        all.div_ceil(MIB as u64).saturating_mul(MIB as u64)
    }

    /// The largest size that fits into the memory, but at least 1.
    fn largest_size(&self, memory: u64) -> usize {
        let fits = |size| {
            let derived = self.of_size(size);
            let threads = (derived.get(Limit::Threads) as u64).saturating_mul(MIN_PER_THREAD);
            let threads = threads.max(memory / SHARE_OF_THREADS);
            estimate(&derived, self.usage, 0).saturating_add(threads) <= memory
        };
        // No relay is larger: each slot takes some KiB.
        let most = usize::try_from(memory / KIB as u64).unwrap_or(usize::MAX);
        largest(1, most, fits).unwrap_or(1)
    }

    /// The limits of a relay of this size. A larger size makes none of them smaller.
    fn of_size(&self, size: usize) -> Derived {
        let given = |limit: Limit, default: usize| self.explicit(limit).unwrap_or(default);
        let is_by_memory = self.memory.is_some();
        let all = if is_by_memory { size } else { size.min(DEFAULT_SIZE) };
        let circuits = given(Limit::Circuits, all.saturating_mul(2).min(DEFAULT_SIZE).max(all));
        let per_peer = given(Limit::CircuitsPerPeer, (all / 8).clamp(1, 64));
        let per_connection = buffered_per_connection(per_peer, all);
        let per_connection = given(Limit::BufferedPerConnection, per_connection);
        let by_memory = usize::try_from(self.memory.unwrap_or(u64::MAX) / MEMORY_PER_THREAD);
        let threads = self.usage.default_threads.min(by_memory.unwrap_or(usize::MAX)).max(1);
        Derived([
            given(Limit::Reservations, size),
            circuits,
            per_peer,
            given(Limit::Connections, size.saturating_mul(2).max(4)),
            given(Limit::Handshakes, (all / 2).clamp(4, 256)),
            given(Limit::Streams, circuits.saturating_mul(4).max(all)),
            per_connection,
            given(Limit::Buffered, buffered(per_connection, all)),
            given(Limit::Threads, threads),
        ])
    }

    fn explicit(&self, limit: Limit) -> Option<usize> {
        self.explicit.get(limit as usize).copied().flatten()
    }

    fn with(&self, limit: Limit, value: Option<usize>) -> Self {
        let mut other = *self;
        if let Some(explicit) = other.explicit.get_mut(limit as usize) {
            *explicit = value;
        }
        other
    }

    /// The memory that the relay takes at most, in bytes.
    pub fn estimate(&self) -> u64 {
        estimate(&self.derive(), self.usage, self.kept_by_thread())
    }

    /// How much freed memory each thread may keep, in bytes.
    pub fn kept_by_thread(&self) -> u64 {
        let threads = self.derive().get(Limit::Threads).max(1) as u64;
        let share = self.memory.map_or(u64::MAX, |memory| memory / SHARE_OF_THREADS / threads);
        share.clamp(MIN_PER_THREAD, MAX_PER_THREAD)
    }
}

/// The largest number from `least` to `most` for which this holds, if it holds for all below that.
fn largest(least: usize, most: usize, holds: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut low, mut high) = (least, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        match holds(middle) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    holds(low).then_some(low)
}

/// A size as the flags take it.
fn shown(bytes: u64) -> String {
    in_kib(usize::try_from(bytes.div_ceil(KIB as u64)).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::program::mux::stream_limits::StreamLimits;

    const GIB: u64 = 1024 * MIB as u64;

    fn given(memory: Option<u64>) -> Given {
        let usage = Usage { default_threads: 2, ..Usage::default() };
        Given { memory, explicit: [None; LIMITS.len()], usage }
    }

    #[test]
    fn without_memory_the_defaults_take_below_660_mib_and_16_slots_below_80() {
        let default = given(None);
        assert_eq!(default.derive().0, [1024, 1024, 64, 2048, 256, 4096, 17 * MIB, 80 * MIB, 2]);
        let estimate = default.estimate() / MIB as u64;
        assert!((600..660).contains(&estimate), "{estimate}");
        let few = default.with(Limit::Reservations, Some(16));
        assert_eq!(few.derive().0, [16, 128, 8, 128, 32, 512, 5 * MIB / 2, 16 * MIB, 2]);
        let estimate = few.estimate() / MIB as u64;
        assert!(estimate < 80, "{estimate}");
        // More slots need more connections, and circuits stay as they are.
        let many = default.with(Limit::Reservations, Some(4096));
        assert_eq!(many.derive().0, [4096, 1024, 64, 8192, 256, 4096, 17 * MIB, 80 * MIB, 2]);
        let most = default.with(Limit::Streams, Some(usize::MAX));
        assert_eq!(most.estimate(), u64::MAX);
    }

    #[test]
    fn the_buffers_of_the_default_size_are_those_of_the_library() {
        let library = StreamLimits::default();
        for circuits in [1, 8, 64, 65, 4096] {
            let derived = given(None).with(Limit::CircuitsPerPeer, Some(circuits)).derive();
            let buffers = [Limit::BufferedPerConnection, Limit::Buffered].map(|it| derived.get(it));
            let expected = [library.buffered_per_connection(circuits), library.buffered(circuits)];
            assert_eq!(buffers, expected);
        }
    }

    #[test]
    fn a_limit_that_is_too_much_for_the_memory_is_named_with_the_remedy() {
        let floor = given(Some(0)).least_memory();
        assert!(floor <= 12 * MIB as u64, "{floor}");
        assert_eq!(given(Some(floor)).check(), Ok(()));
        let floor = shown(floor);
        assert_eq!(
            given(Some(5 * MIB as u64)).check(),
            Err(format!("--memory 5MiB: is too little; try {floor} or more"))
        );
        let mut small = given(Some(24 * MIB as u64));
        small.usage.dht = true;
        let problem = small.check().unwrap_err();
        assert!(problem.starts_with("--memory 24MiB: is too little with --dht; try "), "{problem}");
        small = given(small.memory).with(Limit::Connections, Some(5000));
        let problem = small.check().unwrap_err();
        let (_, fit) = problem.split_once("lower it to ").unwrap();
        let fit = fit.split(',').next().unwrap().parse().unwrap();
        assert_eq!(small.with(Limit::Connections, Some(fit)).check(), Ok(()), "{problem}");
        assert!(small.with(Limit::Connections, Some(fit + 1)).check().is_err(), "{problem}");
        small = small.with(Limit::Buffered, Some(100 * MIB));
        let problem = small.check().unwrap_err();
        let expected = "--max-connections 5000: is too much for --memory 24MiB; lower it and --max-buffered, or try ";
        assert!(problem.starts_with(expected), "{problem}");
    }

    #[test]
    fn the_least_memory_is_the_same_on_a_machine_with_many_cores() {
        let mut many = given(Some(12 * MIB as u64));
        many.usage.default_threads = 64;
        assert_eq!(many.check(), Ok(()));
        assert!(many.estimate() <= 12 * MIB as u64);
    }

    /// Explicit limits, most of them missing.
    fn explicit() -> impl Strategy<Value = [Option<usize>; LIMITS.len()]> {
        let any = |most: usize| prop_oneof![3 => Just(None), 1 => (1..most).prop_map(Some)];
        let bytes = any(MIB * 100);
        (
            [any(100_000), any(10_000), any(100), any(100_000), any(2000), any(100_000)],
            [bytes.clone(), bytes],
            any(64),
        )
            .prop_map(|([a, b, c, d, e, f], [g, h], i)| [a, b, c, d, e, f, g, h, i])
    }

    proptest! {
        #[test]
        fn derived_limits_fit_explicit_flags_win_and_more_memory_lowers_no_limit(
            memory in prop_oneof![12 * MIB as u64..100 * MIB as u64, 12 * MIB as u64..64 * GIB],
            more in prop_oneof![0..MIB as u64, 0..64 * GIB],
            explicit in prop_oneof![Just([None; LIMITS.len()]), explicit()],
            (dht, autonat, websocket) in any::<(bool, bool, bool)>(),
            default_threads in 1_usize..256,
        ) {
            let usage = Usage { default_threads, dht, autonat, websocket };
            let small = Given { memory: Some(memory), explicit, usage };
            let derived = small.derive();
            for (limit, _) in LIMITS {
                if let Some(value) = small.explicit(limit) {
                    prop_assert_eq!(derived.get(limit), value);
                }
            }
            match small.check() {
                Ok(()) => prop_assert!(small.estimate() <= memory),
                Err(problem) => {
                    let least = small.estimate() + memory / SHARE_OF_THREADS + MIB as u64;
                    prop_assert!(least > memory, "{}", problem);
                    let named = LIMITS.into_iter().find(|(_, flag)| problem.starts_with(&format!("{flag} ")));
                    let is_explicit = named.is_none_or(|(limit, _)| small.explicit(limit).is_some());
                    prop_assert!(is_explicit && (named.is_some() || problem.starts_with("--memory")), "{}", problem);
                }
            }
            let large = Given { memory: Some(memory + more), ..small };
            let more = large.derive();
            for (limit, _) in LIMITS {
                prop_assert!(more.get(limit) >= derived.get(limit), "{limit:?}");
            }
            prop_assert!(small.check().is_err() || large.check().is_ok());
            prop_assert!(large.estimate() >= small.estimate());
        }
    }
}
