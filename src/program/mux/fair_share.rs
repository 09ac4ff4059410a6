//! Max-min fair shares: which client prefixes hold more than their share of a resource.
//!
//! Sans-IO. Subnets share the resource, and the prefixes of a subnet its share. What those below their share do not use,
//! the others divide: a prefix that holds little has all of it, however much the others hold.

use std::iter;

use crate::address::ClientPrefix;

/// The most rounds of [`fair_share`]. A few suffice unless the holdings are chosen so that each round finds one more
/// below its share; then the share is too small, but never below an equal part.
const MAX_ROUNDS: usize = 32;

/// What a prefix holds; `None` stands for all connections without an IP address.
pub type Holding = (Option<ClientPrefix>, usize);

/// The fair share in `total` of each of these prefixes, in ascending order; `usize::MAX` where all of its subnet together
/// hold no more than the subnet's share.
pub fn shares(holdings: &[Holding], total: usize) -> Vec<usize> {
    let subnet = |holding: &Holding| holding.0.map(ClientPrefix::subnet);
    let by_subnet = holdings.chunk_by(|one, other| subnet(one) == subnet(other));
    let held: Vec<Vec<usize>> =
        by_subnet.map(|subnet| subnet.iter().map(|(_, held)| *held).collect()).collect();
    let sums: Vec<_> = held.iter().map(|held| held.iter().sum()).collect();
    let share_of_subnet = fair_share(&sums, total);
    let shares = held.iter().flat_map(|held| {
        let share = fair_share(held, share_of_subnet);
        iter::repeat_n(share, held.len())
    });
    shares.collect()
}

/// The share of each: those that hold less keep what they hold, the others get equal parts of the rest of `total`.
fn fair_share(held: &[usize], total: usize) -> usize {
    let mut share = 0;
    for _ in 0..MAX_ROUNDS {
        let (mut rest, mut above) = (total, 0);
        for held in held {
            if *held > share {
                above += 1;
            } else {
                rest = rest.saturating_sub(*held);
            }
        }
        match rest.checked_div(above) {
            None => return usize::MAX,
            Some(larger) if larger > share => share = larger,
            Some(_) => break,
        }
    }
    share
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        net::{IpAddr, Ipv4Addr},
    };

    use proptest::prelude::*;

    use super::*;

    fn prefix(subnet: u8, host: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, subnet, host)).into())
    }

    /// Whether each prefix holds more than its share.
    fn above_share(holdings: &[Holding], total: usize) -> Vec<bool> {
        let above = holdings.iter().zip(shares(holdings, total));
        above.map(|((_, held), share)| *held > share).collect()
    }

    #[test]
    fn one_that_holds_little_is_never_above_its_share() {
        let holdings = [(prefix(0, 1), 900), (prefix(1, 1), 10), (prefix(2, 1), 40)];
        assert_eq!(above_share(&holdings, 500), [true, false, false]);
        assert_eq!(above_share(&holdings, 950), [false; 3]);
        assert_eq!(above_share(&holdings, 90), [true, false, false]);
        assert_eq!(above_share(&holdings, 60), [true, false, true]);
    }

    #[test]
    fn many_prefixes_of_one_subnet_have_one_share() {
        let mut holdings: Vec<_> = (0..100).map(|host| (prefix(0, host), 9)).collect();
        holdings.push((prefix(1, 1), 80));
        let above = |holdings: &[Holding]| above_share(holdings, 500);
        let all_but =
            |light: &[usize]| -> Vec<_> { (0..101).map(|at| !light.contains(&at)).collect() };
        assert_eq!(above(&holdings), all_but(&[100]));
        holdings[5].1 = 2;
        assert_eq!(above(&holdings), all_but(&[5, 100]));
    }

    proptest! {
        #[test]
        fn shares_suffice_and_no_prefix_below_an_equal_part_is_above_its_own(
            held in prop::collection::btree_map((0_u8..5, 0_u8..5), 0_usize..100, 0..20),
            total in 0_usize..1000,
        ) {
            let holdings: Vec<_> =
                held.iter().map(|((net, host), held)| (prefix(*net, *host), *held)).collect();
            let above = above_share(&holdings, total);
            let sum = |of: &[Holding]| of.iter().map(|(_, held)| held).sum::<usize>();
            prop_assert_eq!(above.contains(&true), sum(&holdings) > total);
            let nets = held.keys().map(|(net, _)| net).collect::<BTreeSet<_>>().len();
            for (((net, _), mine), above) in held.iter().zip(&above) {
                let hosts = held.keys().filter(|(other, _)| other == net).count();
                prop_assert!(!above || *mine > total / nets / hosts);
            }
            // Without those above their share the resource suffices.
            let others = holdings.iter().zip(above).filter(|(_, above)| !above);
            prop_assert!(others.map(|((_, held), _)| held).sum::<usize>() <= total);
        }
    }
}
