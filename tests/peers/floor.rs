//! The CPU time that the ciphers alone need per relayed gigabyte: a lower bound for any relay.
//!
//! A relay decrypts each record and encrypts it again. This does both with the library of the relay's secure channel,
//! in records of the usual size: Noise messages of 64 KiB with ring's ChaCha20-Poly1305, TLS records of 16 KiB with
//! aws-lc-rs' AES-128-GCM.

use std::fs;

use crate::common::Security;

/// The size of a record's tag, in bytes, the same for both ciphers.
const TAG: usize = 16;

/// Encrypts and decrypts a record; the buffer has room for the tag after it.
type Pass = Box<dyn FnMut(&mut [u8])>;

/// Encrypts and decrypts a record in place with a cipher of this library; both libraries have the same names.
macro_rules! pass {
    ($library:ident, $cipher:ident, $key:expr) => {{
        use $library::aead::{Aad, LessSafeKey, Nonce, UnboundKey, $cipher};

        let key = LessSafeKey::new(UnboundKey::new(&$cipher, &$key).expect("a key"));
        Box::new(move |buffer: &mut [u8]| {
            let nonce = || Nonce::assume_unique_for_key([2; 12]);
            let (record, tag) = buffer.split_at_mut(buffer.len() - TAG);
            let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), record);
            tag.copy_from_slice(sealed.expect("sealing succeeds").as_ref());
            key.open_in_place(nonce(), Aad::empty(), buffer).expect("opening succeeds");
        })
    }};
}

/// CPU seconds per gigabyte, measured over this many bytes.
pub fn seconds_per_gigabyte(security: Security, bytes: u64) -> f64 {
    let (record, mut pass): (usize, Pass) = match security {
        Security::Noise => (65_535 - TAG, pass!(ring, CHACHA20_POLY1305, [1; 32])),
        Security::Tls => (16 * 1024, pass!(aws_lc_rs, AES_128_GCM, [1; 16])),
    };
    let mut buffer = vec![7; record + TAG];
    let records = bytes / record as u64;
    (0..records / 10).for_each(|_| pass(&mut buffer)); // warm-up
    let before = on_cpu();
    (0..records).for_each(|_| pass(&mut buffer));
    (on_cpu() - before) as f64 / (records * record as u64) as f64
}

/// The CPU time of this thread so far, in nanoseconds.
fn on_cpu() -> u64 {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let on_cpu = schedstat.split_whitespace().next().expect("three numbers");
    on_cpu.parse().expect("nanoseconds")
}

/// The name of the processor, and the number of cores.
pub fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").expect("Linux");
    let names = info.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let names: Vec<_> = names.map(|(_, name)| name).collect();
    format!("{}, {} cores", names.first().unwrap_or(&"unknown processor"), names.len())
}
