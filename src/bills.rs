//! Whom slots are billed to, and the caps on how many: by address, and by subnet.
//!
//! Pure, and part of the table in [`crate::reservations`]. Each slot counts towards its address
//! and the address's subnet; what is asked of either costs the same however many there are.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    hash::Hash,
};

use crate::{
    address::{BilledTo, Subnet},
    config::Config,
};

/// The how-manieth departure it was: the order in which slots in grace are taken.
pub type Departure = u64;

/// Which cap leaves no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The relay's own.
    Table,
    /// That of this address.
    Address(BilledTo),
    /// That of this subnet.
    Subnet(Subnet),
}

impl Full {
    /// Whether a slot that is billed so counts towards this cap.
    pub fn covers(self, billed_to: Option<BilledTo>) -> bool {
        match self {
            Self::Table => true,
            Self::Address(address) => billed_to == Some(address),
            Self::Subnet(subnet) => billed_to.map(BilledTo::subnet) == Some(subnet),
        }
    }
}

/// A cap, and how much is held under it.
#[derive(Clone, Copy, Debug)]
pub struct Cap {
    /// Which one.
    pub full: Full,
    /// How many slots are held under it.
    pub held: usize,
    /// How many may be.
    pub most: usize,
}

/// The bills of one relay.
#[derive(Debug)]
pub struct Bills {
    caps: Caps,
    addresses: Bill<BilledTo>,
    subnets: Bill<Subnet>,
}

/// The part of [`Config`] that these follow; `None`: no cap.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    per_ip: Option<usize>,
    per_subnet: Option<usize>,
}

impl From<&Config> for Caps {
    fn from(config: &Config) -> Self {
        Self {
            per_ip: config.reservations_per_ip(),
            per_subnet: config.reservations_per_subnet(),
        }
    }
}

/// How many slots each has to its name, and which of them are in grace.
#[derive(Debug)]
struct Bill<K> {
    slots: HashMap<K, u32>,
    /// One set for all, because most addresses have one slot or none in grace.
    left: BTreeSet<(K, Departure)>,
}

impl<K: Copy + Ord + Hash> Bill<K> {
    fn new() -> Self {
        Self {
            slots: HashMap::new(),
            left: BTreeSet::new(),
        }
    }

    fn of(&self, key: K) -> usize {
        self.slots.get(&key).map_or(0, |slots| *slots as usize)
    }

    fn first_left(&self, key: K) -> Option<Departure> {
        let mut all = self
            .left
            .range((key, Departure::MIN)..=(key, Departure::MAX));
        all.next().map(|(_, departure)| *departure)
    }

    fn add(&mut self, key: K, departure: Option<Departure>) {
        *self.slots.entry(key).or_default() += 1;
        self.left
            .extend(departure.map(|departure| (key, departure)));
    }

    fn remove(&mut self, key: K, departure: Option<Departure>) {
        let Entry::Occupied(mut slots) = self.slots.entry(key) else {
            return;
        };
        *slots.get_mut() -= 1;
        if *slots.get() == 0 {
            slots.remove();
        }
        if let Some(departure) = departure {
            self.left.remove(&(key, departure));
        }
    }
}

impl Bills {
    /// Nothing is billed to anyone.
    pub fn new(caps: Caps) -> Self {
        Self {
            caps,
            addresses: Bill::new(),
            subnets: Bill::new(),
        }
    }

    /// These caps hold from now on.
    pub fn set_caps(&mut self, caps: Caps) {
        self.caps = caps;
    }

    /// How many slots are billed to this address.
    pub fn of_address(&self, address: BilledTo) -> usize {
        self.addresses.of(address)
    }

    /// How many slots are billed to this subnet.
    pub fn of_subnet(&self, subnet: Subnet) -> usize {
        self.subnets.of(subnet)
    }

    /// How many addresses and subnets have a slot to their name: the size of these indices.
    pub fn len(&self) -> usize {
        self.addresses.slots.len() + self.subnets.slots.len()
    }

    /// Whether nothing is billed to anyone.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The caps that a slot billed so counts towards, the narrower first.
    pub fn caps(&self, to: Option<BilledTo>) -> impl Iterator<Item = Cap> {
        let of_address = to.zip(self.caps.per_ip).map(|(address, most)| Cap {
            full: Full::Address(address),
            held: self.of_address(address),
            most,
        });
        let of_subnet = to.zip(self.caps.per_subnet).map(|(address, most)| Cap {
            full: Full::Subnet(address.subnet()),
            held: self.of_subnet(address.subnet()),
            most,
        });
        of_address.into_iter().chain(of_subnet)
    }

    /// Whether a slot could be billed to `to` instead of `from`.
    pub fn could_move(&self, from: Option<BilledTo>, to: Option<BilledTo>) -> bool {
        self.caps(to)
            .all(|cap| cap.full.covers(from) || cap.held < cap.most)
    }

    /// The departure that is longest ago among the slots under this cap.
    pub fn first_left(&self, full: Full) -> Option<Departure> {
        match full {
            Full::Table => None, // the table knows
            Full::Address(address) => self.addresses.first_left(address),
            Full::Subnet(subnet) => self.subnets.first_left(subnet),
        }
    }

    /// Bills one more slot, which is in grace if there was a departure.
    pub fn add(&mut self, to: Option<BilledTo>, departure: Option<Departure>) {
        if let Some(address) = to {
            self.addresses.add(address, departure);
            self.subnets.add(address.subnet(), departure);
        }
    }

    /// Takes a slot off the bill.
    pub fn remove(&mut self, from: Option<BilledTo>, departure: Option<Departure>) {
        if let Some(address) = from {
            self.addresses.remove(address, departure);
            self.subnets.remove(address.subnet(), departure);
        }
    }

    /// A slot's peer left: it is in grace.
    pub fn left(&mut self, billed_to: Option<BilledTo>, departure: Departure) {
        if let Some(address) = billed_to {
            self.addresses.left.insert((address, departure));
            self.subnets.left.insert((address.subnet(), departure));
        }
    }

    /// It came back.
    pub fn came_back(&mut self, billed_to: Option<BilledTo>, departure: Departure) {
        if let Some(address) = billed_to {
            self.addresses.left.remove(&(address, departure));
            self.subnets.left.remove(&(address.subnet(), departure));
        }
    }
}
