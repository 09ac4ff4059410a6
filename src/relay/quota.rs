//! Quotas: how much of something each client prefix holds, and how much it may hold.
//!
//! Sans-IO. One type counts slots, connections, handshakes, streams and circuits alike. A unit counts towards its
//! address, its subnet and the total ([`Scope`]). Only [`Quota::busiest`] takes longer the more units there are.
//!
//! The caps of addresses and subnets hold even while the total has room. When the total or a subnet is full,
//! [`Quota::yields`] tells whether a unit makes room, and [`Quota::load`] which one first: one of the heaviest
//! subnet, and in that of the heaviest address. So a subnet that holds less than its fair share (the total divided by
//! the subnets in use) is not refused because of another one.

use std::collections::{HashMap, hash_map::Entry};

pub use crate::config::Caps;
use crate::{
    address::{ClientPrefix, Subnet},
    event::Refused,
};

/// What a unit counts towards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// An IPv4 address, or an IPv6 /64.
    Address(ClientPrefix),
    /// An IPv4 /24, or an IPv6 /48.
    Subnet(Subnet),
    /// All units.
    Total,
}

impl Scope {
    /// What a unit of this prefix counts towards, the narrowest first.
    pub fn of(prefix: Option<ClientPrefix>) -> impl Iterator<Item = Self> {
        let narrow = prefix.map(|prefix| [Self::Address(prefix), Self::Subnet(prefix.subnet())]);
        narrow.into_iter().flatten().chain([Self::Total])
    }

    /// Whether a unit of this prefix counts towards it.
    pub fn covers(self, prefix: Option<ClientPrefix>) -> bool {
        Self::of(prefix).any(|scope| scope == self)
    }
}

/// The address that holds the most of something, and how much.
pub type Busiest = (ClientPrefix, usize);

/// How much of something is held, and the caps on it.
#[derive(Clone, Debug)]
pub struct Quota {
    /// The caps. Lowering them removes no units.
    pub caps: Caps,
    held: HashMap<Scope, u32>,
}

impl Quota {
    /// A quota of which nothing is held.
    pub fn new(caps: Caps) -> Self {
        Self { caps, held: HashMap::new() }
    }

    /// How much this scope holds.
    pub fn held(&self, scope: Scope) -> usize {
        self.held.get(&scope).map_or(0, |held| *held as usize)
    }

    /// Whether this scope would be above its cap with this many more units.
    fn exceeds_cap(&self, scope: Scope, more: usize) -> bool {
        let cap = match scope {
            Scope::Address(_) => self.caps.per_address,
            Scope::Subnet(_) => self.caps.per_subnet,
            Scope::Total => self.caps.total,
        };
        cap.is_some_and(|cap| self.held(scope) + more > cap)
    }

    /// The narrowest scope that has no room for one more unit of this prefix.
    pub fn full(&self, prefix: Option<ClientPrefix>) -> Option<Scope> {
        Scope::of(prefix).find(|scope| self.exceeds_cap(*scope, 1))
    }

    /// The narrowest scope of this prefix that holds more than its cap, as it may after the caps changed.
    pub fn above(&self, prefix: Option<ClientPrefix>) -> Option<Scope> {
        Scope::of(prefix).find(|scope| self.exceeds_cap(*scope, 0))
    }

    /// Moves one unit from a prefix to another one if the caps allow it; returns whether it did.
    pub fn move_unit(&mut self, from: Option<ClientPrefix>, to: Option<ClientPrefix>) -> bool {
        let is_allowed = |scope: Scope| scope.covers(from) || !self.exceeds_cap(scope, 1);
        let moves = from != to && Scope::of(to).all(is_allowed);
        if moves {
            self.remove(from);
            self.add(to);
        }
        moves
    }

    /// Adds one unit of this prefix.
    pub fn add(&mut self, prefix: Option<ClientPrefix>) {
        for scope in Scope::of(prefix) {
            *self.held.entry(scope).or_default() += 1;
        }
    }

    /// Removes one unit of this prefix.
    pub fn remove(&mut self, prefix: Option<ClientPrefix>) {
        for scope in Scope::of(prefix) {
            if let Entry::Occupied(mut held) = self.held.entry(scope) {
                *held.get_mut() = held.get().saturating_sub(1);
                if *held.get() == 0 {
                    held.remove();
                }
            }
        }
    }

    /// How much the subnet of this prefix holds, and how much its address: the larger, the sooner a unit of it makes
    /// room.
    pub fn load(&self, prefix: Option<ClientPrefix>) -> [usize; 2] {
        prefix.map_or([0; 2], |prefix| {
            [Scope::Subnet(prefix.subnet()), Scope::Address(prefix)].map(|scope| self.held(scope))
        })
    }

    /// Whether a unit of `holder` makes room for one of `newcomer` when the total is full, or the subnet of both: it does
    /// if its subnet, or within one subnet its address, would still hold at least as much as the newcomer's afterwards. A
    /// unit without a prefix makes room for one that has one, and never the other way round.
    pub fn yields(&self, holder: Option<ClientPrefix>, newcomer: Option<ClientPrefix>) -> bool {
        let (Some(holder), Some(newcomer)) = (holder, newcomer) else {
            return holder.is_none() && newcomer.is_some();
        };
        let is_heavier = |holder, newcomer| self.held(holder) > self.held(newcomer) + 1;
        let [from, to] = [holder, newcomer].map(|prefix| Scope::Subnet(prefix.subnet()));
        match from == to {
            true => is_heavier(Scope::Address(holder), Scope::Address(newcomer)),
            false => is_heavier(from, to),
        }
    }

    /// The address that holds the most, and how much.
    pub fn busiest(&self) -> Option<Busiest> {
        let addresses = self.held.iter().filter_map(|(scope, held)| match scope {
            Scope::Address(prefix) => Some((*prefix, *held as usize)),
            _ => None,
        });
        addresses.max_by_key(|(_, held)| *held)
    }

    /// How many scopes hold something.
    pub fn scopes(&self) -> usize {
        self.held.len()
    }
}

impl From<Scope> for Refused {
    fn from(full: Scope) -> Self {
        match full {
            Scope::Address(prefix) => Self::AddressFull(prefix),
            Scope::Subnet(subnet) => Self::SubnetFull(subnet),
            Scope::Total => Self::TableFull,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;

    /// One of 36 addresses in 6 subnets, or none.
    fn prefix() -> impl Strategy<Value = Option<ClientPrefix>> {
        let of = |(subnet, host)| IpAddr::from(Ipv4Addr::new(192, 0, subnet, host)).into();
        prop::option::weighted(0.9, (0_u8..6, 0_u8..6).prop_map(of))
    }

    fn caps() -> impl Strategy<Value = Caps> {
        let cap = || prop::option::of(1_usize..12);
        (prop::option::of(1_usize..24), cap(), cap())
            .prop_map(|(total, per_subnet, per_address)| Caps { total, per_subnet, per_address })
    }

    fn cap(caps: Caps, scope: Scope) -> Option<usize> {
        match scope {
            Scope::Address(_) => caps.per_address,
            Scope::Subnet(_) => caps.per_subnet,
            Scope::Total => caps.total,
        }
    }

    /// A naive model of a [`Quota`]: the prefix of every unit.
    #[derive(Default)]
    struct Model(Vec<Option<ClientPrefix>>);

    impl Model {
        fn held(&self, scope: Scope) -> usize {
            self.0.iter().filter(|prefix| scope.covers(**prefix)).count()
        }

        /// The fair share of each subnet once there is a newcomer.
        fn share(&self, total: usize, newcomer: ClientPrefix) -> usize {
            let mut subnets: Vec<_> =
                self.0.iter().flatten().map(|prefix| prefix.subnet()).collect();
            subnets.push(newcomer.subnet());
            subnets.sort_unstable();
            subnets.dedup();
            total / subnets.len()
        }
    }

    proptest! {
        #[test]
        fn quotas_match_a_naive_count_and_never_exceed_a_cap(
            caps in caps(),
            steps in prop::collection::vec((prefix(), any::<bool>()), 0..120),
        ) {
            let (mut quota, mut model) = (Quota::new(caps), Model::default());
            for (prefix, adds) in steps {
                if adds {
                    let full = quota.full(prefix);
                    let expected = Scope::of(prefix)
                        .find(|scope| cap(caps, *scope).is_some_and(|cap| model.held(*scope) >= cap));
                    prop_assert_eq!(full, expected);
                    if full.is_none() {
                        quota.add(prefix);
                        model.0.push(prefix);
                    }
                } else if let Some(index) = model.0.iter().position(|held| *held == prefix) {
                    quota.remove(prefix);
                    model.0.swap_remove(index);
                }
                prop_assert_eq!(quota.above(prefix), None);
                for scope in Scope::of(prefix) {
                    prop_assert_eq!(quota.held(scope), model.held(scope));
                }
            }
            model.0.drain(..).for_each(|prefix| quota.remove(prefix));
            prop_assert_eq!(quota.scopes(), 0);
        }

        #[test]
        fn a_subnet_below_its_fair_share_is_never_refused_because_of_another(
            total in 1_usize..30,
            arrivals in prop::collection::vec(prefix().prop_filter_map("none", |prefix| prefix), 0..200),
        ) {
            let caps = Caps { total: Some(total), ..Caps::default() };
            let (mut quota, mut model) = (Quota::new(caps), Model::default());
            for newcomer in arrivals {
                let prefix = Some(newcomer);
                if quota.full(prefix).is_some() {
                    let heaviest = (0..total).max_by_key(|nth| quota.load(model.0[*nth]));
                    let heaviest = heaviest.expect("one at least");
                    if !quota.yields(model.0[heaviest], prefix) {
                        let subnet = Scope::Subnet(newcomer.subnet());
                        let share = model.share(total, newcomer);
                        prop_assert!(share == 0 || model.held(subnet) >= share);
                        continue;
                    }
                    quota.remove(model.0.swap_remove(heaviest));
                }
                quota.add(prefix);
                model.0.push(prefix);
                prop_assert!(quota.held(Scope::Total) <= total);
            }
        }
    }

    #[test]
    fn a_quota_is_empty_when_everything_is_released() {
        let mut quota = Quota::new(Caps::default());
        let home = ClientPrefix::from(IpAddr::from(Ipv4Addr::new(192, 0, 2, 1)));
        for prefix in [Some(home), Some(home), None] {
            quota.add(prefix);
        }
        assert_eq!((quota.busiest(), quota.scopes()), (Some((home, 2)), 3));
        for prefix in [Some(home), None, Some(home), Some(home)] {
            quota.remove(prefix);
        }
        assert_eq!(quota.scopes(), 0);
    }
}
