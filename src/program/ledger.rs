//! What each connection holds, kept as yamux reads and writes: see `held.rs`.
//!
//! yamux does not say what it keeps. But all that it keeps came in a frame, or goes in one, and both
//! pass by here. Where it is too much nobody reads on before something was given up: the stream that
//! is most in the way is reset, or the connection closed that takes nothing.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Context,
    time::{Duration, Instant},
};

use libp2p::futures::task::AtomicWaker;

use super::{
    frames::Data,
    held::{Account, Pool},
    substream::Kept,
    unread::FRAME,
};

/// What lies below yamux at most while it does not read: a buffer, and a message of Noise.
const BELOW: usize = 2 * 64 * 1024;

/// How long a connection may take to tell its peer that a stream is given up, once that has to be. One
/// that is busy takes a while; one that takes nothing keeps everyone else waiting meanwhile.
const PATIENCE: Duration = Duration::from_millis(250);

/// The ledgers of all connections. Clones are the same.
#[derive(Clone, Debug)]
pub struct Ledgers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pool: Pool,
    opened: AtomicU64,
    open: Mutex<BTreeMap<u64, Weak<Ledger>>>,
    /// Something is being given up.
    relieves: AtomicBool,
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
    /// What it holds in all.
    pub account: Account,
    entries: Mutex<Entries>,
    /// The last read found something, so that there may be more.
    leaves: AtomicBool,
    waker: AtomicWaker,
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
    /// Yamux was told of streams that nobody has any more.
    told: bool,
    gives: Option<Gives>,
}

/// What a connection is to give up.
#[derive(Clone, Copy, Debug)]
struct Gives {
    what: What,
    since: Instant,
    /// Yamux was told.
    told: bool,
    /// Everyone waits for it.
    for_all: bool,
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
    /// A stream that is not read.
    Stream(Arc<Kept>),
    /// A connection that takes nothing.
    Connection,
}

impl Ledgers {
    /// Of no connection yet.
    pub fn new(pool: Pool) -> Self {
        Self(Arc::new(Shared {
            pool,
            opened: AtomicU64::new(0),
            open: Mutex::default(),
            relieves: AtomicBool::new(false),
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
    pub fn open(&self) -> Arc<Ledger> {
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed);
        let ledger = Arc::new(Ledger {
            all: self.clone(),
            number,
            account: self.0.pool.open(),
            entries: Mutex::default(),
            leaves: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        self.ledgers().insert(number, Arc::downgrade(&ledger));
        ledger
    }

    /// Has whatever is most in the way given up, unless something is being given up already.
    fn relieve(&self) {
        if self.0.relieves.swap(true, Ordering::AcqRel) {
            return;
        }
        let open: Vec<_> = self.ledgers().values().filter_map(Weak::upgrade).collect();
        let heaviest = open.iter().filter_map(|ledger| {
            let (weight, burden) = ledger.heaviest()?;
            Some((weight, ledger, burden))
        });
        match heaviest.max_by_key(|(weight, ..)| *weight) {
            Some((_, ledger, burden)) => ledger.give_up(burden, true),
            None => self.relieved(),
        }
    }

    fn relieved(&self) {
        self.0.relieves.store(false, Ordering::Release);
    }

    fn ledgers(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Ledger>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// Whether there is no room for anything more. Some is being made then.
    pub fn has_to_wait(&self) -> bool {
        if self.all.0.pool.is_over() {
            self.all.relieve();
            return true;
        }
        if !self.account.is_over() {
            return false;
        }
        if self.entries().gives.is_none()
            && let Some((_, burden)) = self.heaviest()
        {
            self.give_up(burden, false);
        }
        true
    }

    /// What of it is most in the way, and how much.
    fn heaviest(&self) -> Option<(u128, Burden)> {
        let now = self.all.0.pool.taken();
        let weight = |bytes: usize, since| bytes as u128 * u128::from(now.saturating_sub(since));
        let entries = self.entries();
        let (unsent, since) = self.account.unsent();
        let coming = entries
            .coming
            .map_or(0, |(data, since)| weight(data.length, since));
        let streams = entries.streams.values().filter_map(|kept| {
            let burden = match (kept.is_dropped(), kept.is_told()) {
                (false, _) => Burden::Stream(Arc::clone(kept)),
                // Yamux still has it, because it cannot write.
                (true, true) => Burden::Connection,
                (true, false) => return None, // it is about to go
            };
            Some((kept.weight(now), burden))
        });
        let others = [coming, weight(unsent, since)].map(|weight| (weight, Burden::Connection));
        streams
            .chain(others)
            .filter(|(weight, _)| *weight > 0)
            .max_by_key(|(weight, _)| *weight)
    }

    fn give_up(&self, burden: Burden, for_all: bool) {
        let all = &self.all.0;
        let (what, given_up) = match burden {
            Burden::Stream(kept) => {
                kept.take_away();
                (What::Stream, &all.streams_given_up)
            }
            Burden::Connection => (What::All, &all.connections_given_up),
        };
        given_up.fetch_add(1, Ordering::Relaxed);
        let mut entries = self.entries();
        let before = entries.gives.take();
        entries.gives = Some(Gives {
            what,
            since: before.map_or_else(Instant::now, |before| before.since),
            told: false,
            for_all: for_all || before.is_some_and(|before| before.for_all),
        });
        drop(entries);
        self.waker.wake();
    }

    /// Yamux is about to go on, and is told which streams nobody has any more. False if this connection
    /// is to end.
    pub fn begins(&self, cx: &Context<'_>) -> bool {
        self.waker.register(cx.waker());
        let mut entries = self.entries();
        if self.account.any_went() {
            entries.told = true;
            entries.streams.values().for_each(|kept| kept.tell());
        }
        let Some(gives) = &mut entries.gives else {
            return true;
        };
        gives.told = true;
        gives.what != What::All
    }

    /// Yamux rests. If it could write all that it had to, it has nothing any more of the streams that
    /// it was told of. False if it is to end, because it could not for too long.
    ///
    /// Where it leaves something to be read it waits until it can write; that lies below.
    pub fn rests(&self, wrote_all: bool) -> bool {
        let leaves = self.leaves.load(Ordering::Relaxed);
        let mut entries = self.entries();
        match (entries.stands, leaves) {
            (false, true) => self.account.take_unsent(BELOW),
            (true, false) => self.account.give_back_unsent(BELOW),
            _ => {}
        }
        entries.stands = leaves;
        if !wrote_all {
            let waits = |gives: Gives| gives.told && gives.since.elapsed() > PATIENCE;
            let ends = entries.gives.is_some_and(waits);
            let connections = &self.all.0.connections_given_up;
            connections.fetch_add(ends.into(), Ordering::Relaxed);
            return !ends;
        }
        if std::mem::take(&mut entries.told) {
            entries.streams.retain(|_, kept| {
                let gone = kept.is_told();
                if gone {
                    kept.is_gone();
                }
                !gone
            });
        }
        if let Some(gives) = entries.gives.take_if(|gives| gives.told)
            && gives.for_all
        {
            self.all.relieved();
        }
        true
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
        let Entries {
            streams, coming, ..
        } = &mut *entries;
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
        if self.entries().gives.is_some_and(|gives| gives.for_all) {
            self.all.relieved();
        }
    }
}
