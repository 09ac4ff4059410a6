//! What each connection holds, kept as yamux reads and writes: see `held.rs`.
//!
//! yamux does not say what it keeps. But all that it keeps came in a frame, or goes in one, and both
//! pass by here. Where it is too much the heaviest connection of the heaviest client prefix resets
//! streams, those first that have waited the most; if it cannot tell its peer so, it is closed. Only that
//! connection is not read meanwhile: no other one waits for it.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Context,
};

use libp2p::futures::task::AtomicWaker;

use super::{
    frames::Data,
    held::{Account, Pool},
    substream::Kept,
    unread::FRAME,
};
use crate::{activity::Signs, address::ClientPrefix};

/// What lies below yamux at most while it does not read: a buffer, and a message of Noise.
const BELOW: usize = 2 * 64 * 1024;

/// The ledgers of all connections. Clones are the same.
#[derive(Clone, Debug)]
pub struct Ledgers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pool: Pool,
    opened: AtomicU64,
    open: Mutex<BTreeMap<u64, Weak<Ledger>>>,
    /// Somewhere it is being decided what is to be given up.
    relieves: AtomicBool,
    /// How many bytes are being given up.
    freeing: AtomicUsize,
    streams_given_up: AtomicU64,
    connections_given_up: AtomicU64,
}

/// What waits in the relay, and what did for too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffered {
    /// How many bytes wait.
    pub bytes: usize,
    /// How many streams were reset, in all, because too much had waited for too long.
    pub streams_given_up: u64,
    /// How many connections were closed for that.
    pub connections_given_up: u64,
}

/// The ledger of a connection that is open.
#[derive(Debug)]
pub struct Ledger {
    all: Ledgers,
    number: u64,
    of: Client,
    /// What it holds in all.
    pub account: Account,
    entries: Mutex<Entries>,
    /// How many of its bytes are being given up.
    freeing: AtomicUsize,
    /// The last read found something, so that there may be more.
    leaves: AtomicBool,
    /// It was not read, because it holds more than its share.
    pauses: AtomicBool,
    waker: AtomicWaker,
}

/// Where a connection comes from, and what counts as heard of it while it is not read.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// The prefix of its client, which all its connections weigh on.
    pub prefix: Option<ClientPrefix>,
    /// What the transport hears of it.
    pub signs: Signs,
}

#[derive(Debug, Default)]
struct Entries {
    streams: HashMap<u32, Arc<Kept>>,
    /// The frame that is coming, and since when; or the last that came, if its stream is none of
    /// those: it opens one, or is for one that yamux will not know.
    coming: Option<(Data, u64)>,
    /// What of a frame is on its way out.
    going: usize,
    /// Something is left to be read.
    stands: bool,
    /// The dropped streams that yamux was told of.
    told: Vec<u32>,
    gives: Option<Gives>,
}

/// What a connection is to give up.
#[derive(Clone, Copy, Debug)]
struct Gives {
    what: What,
    /// Yamux was told.
    told: bool,
}

/// How a connection rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// With nothing to give up.
    Calm,
    /// It gave something up, and is to be read again.
    Relieved,
    /// It cannot tell its peer yet what it gives up.
    Blocked,
    /// It holds more than its share of a pool that is over its limit, and is to be read again in a moment.
    Paused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// A stream that was taken away: what yamux has of it.
    Stream,
    /// All.
    All,
}

/// What is most in the way.
enum Burden {
    /// A stream that is not read, and how many bytes wait on it.
    Stream(Arc<Kept>, usize),
    /// A connection that takes nothing.
    Connection,
}

/// Connections by what they hold, and what their prefixes do.
struct Heaviest {
    prefixes: HashMap<Option<ClientPrefix>, usize>,
    connections: Vec<(Arc<Ledger>, usize)>,
}

impl Heaviest {
    fn new(connections: Vec<Arc<Ledger>>) -> Self {
        let mut prefixes: HashMap<_, usize> = HashMap::new();
        let weigh = |ledger: Arc<Ledger>| {
            let load = ledger.load();
            *prefixes.entry(ledger.of.prefix).or_default() += load;
            (ledger, load)
        };
        let connections = connections.into_iter().map(weigh).collect();
        Self { prefixes, connections }
    }

    /// Has the heaviest connection of the heaviest prefix give something up; `None` if there is nothing.
    fn give_up(&mut self) -> Option<()> {
        let heaviest = self.connections.iter_mut().max_by_key(|(ledger, load)| {
            let of_prefix = self.prefixes.get(&ledger.of.prefix).copied().unwrap_or_default();
            (of_prefix, ledger.of.prefix, *load)
        });
        let (ledger, load) = heaviest.filter(|(_, load)| *load > 0)?;
        let given_up = match ledger.heaviest() {
            Some(burden) => ledger.give_up(burden).min(*load),
            None => *load, // it was read meanwhile
        };
        *load -= given_up;
        if let Some(of_prefix) = self.prefixes.get_mut(&ledger.of.prefix) {
            *of_prefix = of_prefix.saturating_sub(given_up);
        }
        Some(())
    }
}

impl Ledgers {
    /// Of no connection yet.
    pub fn new(pool: Pool) -> Self {
        Self(Arc::new(Shared {
            pool,
            opened: AtomicU64::new(0),
            open: Mutex::default(),
            relieves: AtomicBool::new(false),
            freeing: AtomicUsize::new(0),
            streams_given_up: AtomicU64::new(0),
            connections_given_up: AtomicU64::new(0),
        }))
    }

    /// What waits, and what was given up.
    pub fn buffered(&self) -> Buffered {
        Buffered {
            bytes: self.0.pool.held(),
            streams_given_up: self.0.streams_given_up.load(Ordering::Relaxed),
            connections_given_up: self.0.connections_given_up.load(Ordering::Relaxed),
        }
    }

    /// Of one more connection.
    pub fn open(&self, of: Client) -> Arc<Ledger> {
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed);
        let ledger = Arc::new(Ledger {
            all: self.clone(),
            number,
            of,
            account: self.0.pool.open(),
            entries: Mutex::default(),
            freeing: AtomicUsize::new(0),
            leaves: AtomicBool::new(false),
            pauses: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        self.ledgers().insert(number, Arc::downgrade(&ledger));
        ledger
    }

    /// Where all together hold too much: decides what is given up, so that a tenth of the pool is free
    /// afterwards. Each time it takes from the heaviest connection of the heaviest prefix.
    fn relieve(&self) {
        let shared = &self.0;
        let held = || shared.pool.held().saturating_sub(shared.freeing.load(Ordering::Acquire));
        if held() <= shared.pool.max() || shared.relieves.swap(true, Ordering::AcqRel) {
            return;
        }
        let open = self.ledgers().values().filter_map(Weak::upgrade).collect();
        let mut heaviest = Heaviest::new(open);
        while held() > shared.pool.max() / 10 * 9 && heaviest.give_up().is_some() {}
        shared.relieves.store(false, Ordering::Release);
    }

    fn ledgers(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Ledger>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// Whether it is not to be read now: it holds too much, and gives something up first. That the relay
    /// does not read is not the peer's silence.
    pub fn has_to_wait(&self) -> bool {
        self.all.relieve();
        if self.account.is_over() && self.freeing.load(Ordering::Acquire) == 0 {
            match self.heaviest() {
                Some(burden) => _ = self.give_up(burden),
                None => return false, // what waited was read just now
            }
        }
        let pauses = self.is_above_share();
        self.pauses.store(pauses, Ordering::Relaxed);
        let waits = pauses || self.freeing.load(Ordering::Acquire) > 0;
        if waits {
            self.of.signs.heard(1);
        }
        waits
    }

    /// The peer sends more frames that open streams, reset them or ping than it may.
    pub fn floods(&self) {
        self.of.signs.set_flooding();
    }

    /// Whether the pool holds too much, until what is being given up is free, and this connection more than
    /// its share of it.
    fn is_above_share(&self) -> bool {
        let pool = &self.all.0.pool;
        pool.held() > pool.max() && self.load() > pool.max() / self.all.ledgers().len().max(1)
    }

    /// How many bytes it holds that are not being given up.
    fn load(&self) -> usize {
        self.account.held().saturating_sub(self.freeing.load(Ordering::Acquire))
    }

    /// What of it is most in the way: the stream on which the most bytes have waited for the longest, or
    /// else the connection.
    fn heaviest(&self) -> Option<Burden> {
        let now = self.all.0.pool.taken();
        let entries = self.entries();
        let streams = entries.streams.values().filter(|kept| !kept.is_dropped());
        let heaviest = streams.max_by_key(|kept| kept.weight(now));
        match heaviest.map(|kept| (kept, kept.takes())) {
            Some((kept, takes)) if takes > 0 => Some(Burden::Stream(Arc::clone(kept), takes)),
            _ => (self.load() > 0).then_some(Burden::Connection),
        }
    }

    /// Gives it up; yields how many bytes that will free.
    fn give_up(&self, burden: Burden) -> usize {
        let all = &self.all.0;
        let (what, bytes, given_up) = match burden {
            Burden::Stream(kept, bytes) => {
                kept.take_away();
                (What::Stream, bytes, &all.streams_given_up)
            }
            Burden::Connection => (What::All, self.load(), &all.connections_given_up),
        };
        given_up.fetch_add(1, Ordering::Relaxed);
        self.freeing.fetch_add(bytes, Ordering::AcqRel);
        all.freeing.fetch_add(bytes, Ordering::AcqRel);
        self.entries().gives = Some(Gives { what, told: false });
        self.waker.wake();
        bytes
    }

    /// What was being given up is.
    fn relieved(&self) {
        let freed = self.freeing.swap(0, Ordering::AcqRel);
        self.all.0.freeing.fetch_sub(freed, Ordering::AcqRel);
    }

    /// Yamux is about to go on, and is told which streams nobody has any more. False if this connection
    /// is to end.
    pub fn begins(&self, cx: &Context<'_>) -> bool {
        self.waker.register(cx.waker());
        let mut entries = self.entries();
        let went = self.account.take_went();
        let went_on = went.iter().filter_map(|id| entries.streams.get(id));
        went_on.for_each(|kept| kept.tell());
        entries.told.extend(went);
        let Some(gives) = &mut entries.gives else {
            return true;
        };
        gives.told = true;
        gives.what != What::All
    }

    /// Yamux rests. If it could write all that it had to, it has nothing any more of the streams that
    /// it was told of.
    ///
    /// Where it leaves something to be read it waits until it can write; that lies below.
    pub fn rests(&self, wrote_all: bool) -> Rest {
        let leaves = self.leaves.load(Ordering::Relaxed);
        let mut entries = self.entries();
        match (entries.stands, leaves) {
            (false, true) => self.account.take_unsent(BELOW),
            (true, false) => self.account.give_back_unsent(BELOW),
            _ => {}
        }
        entries.stands = leaves;
        let rest = match self.pauses.load(Ordering::Relaxed) {
            true => Rest::Paused,
            false => Rest::Calm,
        };
        if !wrote_all {
            return if entries.gives.is_some() { Rest::Blocked } else { rest };
        }
        for id in std::mem::take(&mut entries.told) {
            // Unless another has its number by now.
            if let Entry::Occupied(kept) = entries.streams.entry(id)
                && kept.get().is_told()
            {
                kept.remove().is_gone();
            }
        }
        if entries.gives.take_if(|gives| gives.told).is_none() {
            return rest;
        }
        drop(entries);
        self.relieved();
        Rest::Relieved
    }

    /// It could not tell its peer for too long, and is to be closed.
    pub fn is_closed_instead(&self) {
        self.all.0.connections_given_up.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether it is to give something up. A connection that is being closed does so at once.
    pub fn gives(&self, cx: &Context<'_>) -> bool {
        self.waker.register(cx.waker());
        self.entries().gives.is_some()
    }

    /// There is one more stream, on our side.
    pub fn open(&self, id: yamux::StreamId, stream: Arc<Kept>) {
        let mut entries = self.entries();
        // The frame that opened it is the last that came.
        let opened_by = |(data, _): &mut (Data, u64)| data.stream == id.val();
        if let Some((data, _)) = entries.coming.take_if(opened_by) {
            self.account.give_back(data.length + FRAME);
            stream.arrives(data.length);
        }
        // Yamux has nothing of the one before it, or it would not take the name again.
        if let Some(before) = entries.streams.insert(id.val(), stream) {
            before.is_gone();
        }
    }

    /// Yamux asked for more to read; whether there was some.
    pub fn read_some(&self, some: bool) {
        self.leaves.store(some, Ordering::Relaxed);
    }

    /// A frame begins to come. It takes all of its room at once.
    pub fn comes(&self, data: Data) {
        self.account.take(data.length + FRAME);
        let coming = (data, self.all.0.pool.taken());
        if let Some((before, _)) = self.entries().coming.replace(coming) {
            self.account.give_back(before.length + FRAME);
        }
    }

    /// It has come.
    pub fn came(&self) {
        let mut entries = self.entries();
        let Entries { streams, coming, .. } = &mut *entries;
        let of = coming.and_then(|(data, _)| Some((data, streams.get(&data.stream)?)));
        if let Some((data, stream)) = of {
            *coming = None;
            self.account.give_back(data.length + FRAME);
            stream.arrives(data.length);
        }
    }

    /// A frame begins to go.
    pub fn goes(&self, data: Data) {
        if data.length > 0 {
            self.entries().going += data.length + FRAME;
        }
    }

    /// It has gone.
    pub fn went(&self) {
        let mut entries = self.entries();
        let going = std::mem::take(&mut entries.going);
        if going > 0 {
            self.account.give_back_unsent(going);
            entries.streams.values().for_each(|kept| kept.go_on());
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.all.ledgers().remove(&self.number);
        self.relieved();
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, task::Waker};

    use super::*;

    const MAX: usize = 1000;

    fn of(last: u8) -> Client {
        Client { prefix: Some(IpAddr::from([10, 0, 0, last]).into()), ..Client::default() }
    }

    fn begins(ledger: &Ledger) -> bool {
        ledger.begins(&Context::from_waker(Waker::noop()))
    }

    #[test]
    fn above_the_pool_only_the_heaviest_connection_of_the_heaviest_prefix_waits() {
        let all = Ledgers::new(Pool::new(MAX, MAX));
        let [light, other, heavy] = [1, 2, 2].map(|last| all.open(of(last)));
        light.account.take(330);
        other.account.take(300);
        heavy.account.take(400);
        // What the heaviest connection gives up is enough, and it alone is to end.
        assert!(!light.has_to_wait() && !other.has_to_wait());
        assert!(heavy.has_to_wait());
        assert!(begins(&light) && begins(&other) && !begins(&heavy));
        assert_eq!(all.buffered().connections_given_up, 1);
        // It is not asked of twice, nor of another one while it is not gone.
        assert!(!light.has_to_wait());
        assert_eq!(all.buffered().connections_given_up, 1);
        drop(heavy);
        assert_eq!((all.buffered().bytes, all.0.freeing.load(Ordering::Relaxed)), (630, 0));
        // Nothing is given up below the pool's limit; above it, down to nine tenths.
        light.account.take(370);
        assert!(!light.has_to_wait());
        light.account.take(1);
        assert!(light.has_to_wait() && !other.has_to_wait());
    }

    #[test]
    fn a_connection_above_its_own_limit_waits_and_no_other_does() {
        let all = Ledgers::new(Pool::new(10 * MAX, MAX));
        let [full, other] = [1, 1].map(|last| all.open(of(last)));
        full.account.take(MAX);
        assert!(!full.has_to_wait());
        full.account.take(1);
        assert!(full.has_to_wait() && !other.has_to_wait());
        assert!(!begins(&full));
    }

    #[test]
    fn above_the_pool_those_with_more_than_their_share_pause_until_it_is_free() {
        let all = Ledgers::new(Pool::new(MAX, MAX));
        let [small, large, heaviest] = [1, 2, 3].map(|last| all.open(of(last)));
        small.account.take(100);
        large.account.take(400);
        heaviest.account.take(501);
        assert!(heaviest.has_to_wait() && large.has_to_wait() && !small.has_to_wait());
        assert_eq!((large.rests(true), small.rests(true)), (Rest::Paused, Rest::Calm));
        drop(heaviest);
        assert!(!large.has_to_wait());
        assert_eq!(large.rests(true), Rest::Calm);
    }

    #[test]
    fn while_it_is_not_read_it_is_not_silent() {
        let all = Ledgers::new(Pool::new(MAX, MAX));
        let ledger = all.open(of(1));
        ledger.has_to_wait();
        assert_eq!(ledger.of.signs.count(), 0);
        ledger.account.take(MAX + 1);
        ledger.has_to_wait();
        assert!(ledger.of.signs.count() > 0);
    }
}
