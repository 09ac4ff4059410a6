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
    addresses: HashMap<BilledTo, Bill>,
    subnets: HashMap<Subnet, Bill>,
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

/// What one address or subnet has to its name.
#[derive(Debug, Default)]
struct Bill {
    slots: usize,
    /// Those of them that are in grace.
    left: BTreeSet<Departure>,
}

impl Bills {
    /// Nothing is billed to anyone.
    pub fn new(caps: Caps) -> Self {
        Self {
            caps,
            addresses: HashMap::new(),
            subnets: HashMap::new(),
        }
    }

    /// These caps hold from now on.
    pub fn set_caps(&mut self, caps: Caps) {
        self.caps = caps;
    }

    /// How many slots are billed to this address.
    pub fn of_address(&self, address: BilledTo) -> usize {
        self.addresses.get(&address).map_or(0, |bill| bill.slots)
    }

    /// How many slots are billed to this subnet.
    pub fn of_subnet(&self, subnet: Subnet) -> usize {
        self.subnets.get(&subnet).map_or(0, |bill| bill.slots)
    }

    /// How many addresses and subnets have a slot to their name: the size of these indices.
    pub fn len(&self) -> usize {
        self.addresses.len() + self.subnets.len()
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
        let bill = match full {
            Full::Table => return None, // the table knows
            Full::Address(address) => self.addresses.get(&address),
            Full::Subnet(subnet) => self.subnets.get(&subnet),
        };
        bill?.left.first().copied()
    }

    /// Bills one more slot, which is in grace if there was a departure.
    pub fn add(&mut self, to: Option<BilledTo>, departure: Option<Departure>) {
        let Some(address) = to else {
            return;
        };
        for bill in [
            self.addresses.entry(address).or_default(),
            self.subnets.entry(address.subnet()).or_default(),
        ] {
            bill.slots += 1;
            bill.left.extend(departure);
        }
    }

    /// Takes a slot off the bill.
    pub fn remove(&mut self, from: Option<BilledTo>, departure: Option<Departure>) {
        if let Some(address) = from {
            take_off(&mut self.addresses, address, departure);
            take_off(&mut self.subnets, address.subnet(), departure);
        }
    }

    /// A slot's peer left: it is in grace.
    pub fn left(&mut self, billed_to: Option<BilledTo>, departure: Departure) {
        for bill in self.of(billed_to) {
            bill.left.insert(departure);
        }
    }

    /// It came back.
    pub fn came_back(&mut self, billed_to: Option<BilledTo>, departure: Departure) {
        for bill in self.of(billed_to) {
            bill.left.remove(&departure);
        }
    }

    fn of(&mut self, to: Option<BilledTo>) -> impl Iterator<Item = &mut Bill> {
        let address = to.and_then(|address| self.addresses.get_mut(&address));
        let subnet = to.and_then(|address| self.subnets.get_mut(&address.subnet()));
        address.into_iter().chain(subnet)
    }
}

fn take_off<K: Hash + Eq>(bills: &mut HashMap<K, Bill>, key: K, departure: Option<Departure>) {
    let Entry::Occupied(mut bill) = bills.entry(key) else {
        return;
    };
    bill.get_mut().slots -= 1;
    if let Some(departure) = departure {
        bill.get_mut().left.remove(&departure);
    }
    if bill.get().slots == 0 {
        bill.remove();
    }
}
