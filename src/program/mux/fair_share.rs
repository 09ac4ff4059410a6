//! Max-min fair shares: which client prefixes hold more than their share of a resource.
//!
//! Sans-IO. Subnets share the resource, and the prefixes of a subnet its share. What those below their share do not use,
//! the others divide: a prefix that holds little has all of it, however much the others hold.

use std::collections::BTreeSet;

use crate::address::ClientPrefix;

/// What a prefix holds; `None` stands for all connections without an IP address.
pub type Holding = (Option<ClientPrefix>, usize);

/// The prefixes of `holdings` (in ascending order, each once) that hold more than their fair share of `total`.
pub fn above_share(holdings: &[Holding], total: usize) -> BTreeSet<Option<ClientPrefix>> {
    let by_subnet = || {
        holdings
            .chunk_by(|(a, _), (b, _)| a.map(ClientPrefix::subnet) == b.map(ClientPrefix::subnet))
    };
    let share_of_subnet = fair_share(by_subnet().map(sum).collect(), total);
    let above = by_subnet().filter(|subnet| sum(subnet) > share_of_subnet).flat_map(|subnet| {
        let share = fair_share(subnet.iter().map(|(_, held)| *held).collect(), share_of_subnet);
        subnet.iter().filter(move |(_, held)| *held > share)
    });
    above.map(|(prefix, _)| *prefix).collect()
}

fn sum(holdings: &[Holding]) -> usize {
    holdings.iter().map(|(_, held)| held).sum()
}

/// The share of each: those that hold less keep what they hold, the others get equal parts of the rest of `total`.
fn fair_share(mut held: Vec<usize>, total: usize) -> usize {
    held.sort_unstable();
    let (mut rest, mut holders) = (total, held.len());
    for held in held {
        if held > rest / holders {
            return rest / holders;
        }
        rest -= held;
        holders -= 1;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;

    fn prefix(subnet: u8, host: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, subnet, host)).into())
    }

    #[test]
    fn one_that_holds_little_is_never_above_its_share() {
        let holdings = [(prefix(0, 1), 900), (prefix(1, 1), 10), (prefix(2, 1), 40)];
        assert_eq!(above_share(&holdings, 500), BTreeSet::from([prefix(0, 1)]));
        assert_eq!(above_share(&holdings, 950), BTreeSet::new());
        assert_eq!(above_share(&holdings, 119), BTreeSet::from([prefix(0, 1)]));
        assert_eq!(above_share(&holdings, 60), BTreeSet::from([0, 2].map(|it| prefix(it, 1))));
    }

    #[test]
    fn many_prefixes_of_one_subnet_have_one_share() {
        let mut holdings: Vec<_> = (0..100).map(|host| (prefix(0, host), 9)).collect();
        holdings.push((prefix(1, 1), 80));
        assert_eq!(above_share(&holdings, 500).len(), 100);
        holdings[5].1 = 2;
        assert!(!above_share(&holdings, 500).contains(&prefix(0, 5)));
        assert!(!above_share(&holdings, 500).contains(&prefix(1, 1)));
    }

    proptest! {
        #[test]
        fn shares_suffice_and_no_prefix_below_an_equal_part_is_above_its_own(
            held in prop::collection::btree_map((0_u8..5, 0_u8..5), 0_usize..100, 0..20),
            total in 0_usize..1000,
        ) {
            let holdings: Vec<_> = held.iter().map(|((net, host), held)| (prefix(*net, *host), *held)).collect();
            let above = above_share(&holdings, total);
            prop_assert_eq!(above.is_empty(), sum(&holdings) <= total);
            let nets: BTreeSet<_> = held.keys().map(|(net, _)| net).collect();
            for ((net, host), mine) in &held {
                let hosts = held.keys().filter(|(other, _)| other == net).count();
                if *mine <= total / nets.len() / hosts {
                    prop_assert!(!above.contains(&prefix(*net, *host)));
                }
            }
            // Without those above their share the resource suffices.
            let others: Vec<_> = holdings.into_iter().filter(|(it, _)| !above.contains(it)).collect();
            prop_assert!(sum(&others) <= total);
        }
    }
}
