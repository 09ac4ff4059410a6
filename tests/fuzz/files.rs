//! Files that an operator names: the key file, the configuration, and the swarm key.

use std::{cell::RefCell, ffi::OsString, fs, path::PathBuf};

use libp2p::identity::Keypair;
use proptest::{collection::vec, prelude::*, sample::select};
use relaylet::program::cli::{flags::Flags, identity::load_or_create, load::Exit};
use tempfile::TempDir;

thread_local! {
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// Writes a file with these bytes.
fn file_with(bytes: &[u8]) -> PathBuf {
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| tempfile::tempdir().expect("a folder"));
        let file = folder.path().join("file");
        fs::write(&file, bytes).expect("the file is written");
        file
    })
}

fn assert_one_line(line: &str, file: &str) {
    assert!(line.starts_with(file), "{line:?}");
    let control = line.chars().find(|char| char.is_control());
    assert_eq!(control, None, "{line:?}");
}

/// Loads `bytes` as a key file.
pub fn check_identity(bytes: &[u8]) {
    let file = file_with(bytes);
    let loaded = load_or_create(&file);
    assert_eq!(fs::read(&file).expect("the file is kept"), bytes);
    match loaded {
        Ok(identity) => {
            assert_eq!(identity.created, None);
            let public = identity.keypair.public();
            let again = identity.keypair.to_protobuf_encoding().expect("a key");
            let again = Keypair::from_protobuf_encoding(&again).expect("a key");
            assert_eq!(again.public(), public);
            let signed = identity.keypair.sign(b"a voucher").expect("a signature");
            assert!(public.verify(b"a voucher", &signed));
        }
        Err(error) => assert_one_line(&format!("{error:#}"), "--identity "),
    }
}

/// Loads `bytes` as a swarm key.
#[cfg(feature = "pnet")]
pub fn check_swarm_key(bytes: &[u8]) {
    use relaylet::program::net::swarm_key;

    let file = file_with(bytes);
    match swarm_key::load(&file) {
        Ok(key) => {
            let written = file_with(key.to_key_file().as_bytes());
            assert!(swarm_key::load(&written).expect("a key") == key);
            // libp2p's own reader accepts fewer files, and must read the same key from those.
            let text = String::from_utf8(bytes.to_vec());
            let other = text.ok().and_then(|text| text.parse().ok());
            assert!(other.is_none_or(|other| key == other));
        }
        Err(error) => assert_one_line(&format!("{error:#}"), "--swarm-key "),
    }
}

fn flags(arguments: &[&str]) -> Result<Flags, Exit> {
    let program = ["relaylet"].iter().chain(arguments);
    Flags::read(program.map(OsString::from), [])
}

/// Loads `bytes` as a configuration file: if it is valid, it is printed, and must load as the same configuration.
pub fn check_config(bytes: &[u8]) {
    let file = file_with(bytes);
    let named = file.to_str().expect("text");
    let read = match flags(&["--config", named]) {
        Ok(read) => read,
        Err(Exit::Usage(line)) => {
            let control = line.chars().find(|char| char.is_control());
            assert_eq!(control, None, "{line:?}");
            assert!(!line.is_empty());
            return;
        }
        Err(Exit::Print(what)) => panic!("printed without --print-config: {what}"),
    };
    assert_eq!(read.config().validate(), Ok(()));
    let printed = read.to_file().expect("all values can be printed");
    file_with(printed.as_bytes());
    let again = flags(&["--config", named]);
    let again = again.unwrap_or_else(|stop| panic!("{stop:?}\n{printed}"));
    assert_eq!(again.settings(), read.settings(), "{printed}");
    assert_eq!(again.differing(&read), Ok(vec![]));
    assert_eq!(again.to_file().expect("it was printed"), printed);
}

/// Keys of each type, some of them spoiled.
pub fn identities() -> impl Strategy<Value = Vec<u8>> {
    let of = |key: Option<Keypair>| {
        let key = key.expect("a key");
        key.to_protobuf_encoding().expect("an encoding")
    };
    let secret = any::<[u8; 32]>();
    let key = prop_oneof![
        4 => secret.prop_map(move |mut secret| of(Keypair::ed25519_from_bytes(&mut secret).ok())),
        1 => (0..4u8, vec(any::<u8>(), 0..140)).prop_map(|(kind, data)| {
            let length = data.len() as u8;
            let prefix = match length {
                0..128 => vec![8, kind, 18, length],
                _ => vec![8, kind, 18, length, 1],
            };
            [prefix, data].concat()
        }),
        1 => Just(of(Some(Keypair::generate_secp256k1()))),
        1 => Just(of(Some(Keypair::generate_ecdsa()))),
        1 => super::protobuf::messages(),
    ];
    spoiled(key)
}

/// Swarm keys in each encoding, some of them spoiled.
#[cfg(feature = "pnet")]
pub fn swarm_keys() -> impl Strategy<Value = Vec<u8>> {
    let heading = select(vec![
        "/key/swarm/psk/1.0.0/",
        "/key/swarm/psk/1.0.0/ ",
        "/key/swarm/psk/2.0.0/",
        "",
    ]);
    let encoding = select(vec!["/base16/", "/base64/", "/bin/", "/base32/"]);
    let end = select(vec!["\n", "\r\n", "", "\n\n", " \n"]);
    let key = prop_oneof![
        "[0-9a-fA-F]{64}".prop_map(String::into_bytes),
        "[0-9a-fA-F+]{62,66}".prop_map(String::into_bytes),
        "[0-9a-zA-Z+/]{43}=".prop_map(String::into_bytes),
        "[0-9a-zA-Z+/]{42}[AEIMQUYcgkosw048]=".prop_map(String::into_bytes),
        vec(any::<u8>(), 30..40),
    ];
    let file = (heading, end.clone(), encoding, key, end).prop_map(
        |(heading, first, encoding, key, last)| {
            [format!("{heading}{first}{encoding}{first}").as_bytes(), &key, last.as_bytes()]
                .concat()
        },
    );
    spoiled(file)
}

/// Flips a bit of one in three, or truncates it.
fn spoiled(files: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let how =
        prop_oneof![4 => Just(None), 2 => (0..9u32, any::<prop::sample::Index>()).prop_map(Some)];
    (files, how).prop_map(|(mut file, how)| {
        match how {
            Some((8, at)) if !file.is_empty() => file.truncate(at.index(file.len())),
            Some((bit, at)) if !file.is_empty() => {
                let at = at.index(file.len());
                file[at] ^= 1u8.checked_shl(bit).unwrap_or(1);
            }
            _ => {}
        }
        file
    })
}

/// Settings by their names, mostly with values of a suitable kind.
pub fn configs() -> impl Strategy<Value = Vec<u8>> {
    let known = flags(&[]).expect("the defaults").settings().expect("text");
    let names: Vec<_> = known.keys().cloned().collect();
    let lists = [
        "listen",
        "announce",
        "proxy-protocol-from",
        "trust-forwarded-from",
        "http-host",
        "allow-peer",
        "deny-peer",
        "allow-subnet",
        "deny-subnet",
        "allow-connect-peer",
    ];
    let number = select(vec![
        "0",
        "1",
        "7",
        "1_000",
        "-1",
        "+3",
        "64",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "0x1F",
        "1.5",
        "true",
        "\"18446744073709551615\"",
        "\"12\"",
    ]);
    let time = select(vec![
        "\"1s\"",
        "\"0s\"",
        "\"2m\"",
        "\"1h 30m\"",
        "\"500ms\"",
        "\"3500ms\"",
        "\"365days\"",
        "\"1year\"",
        "\"366days\"",
        "\"soon\"",
        "\"1ns\"",
        "\"18446744073709551615s\"",
        "1",
        "\"\"",
    ]);
    let size =
        select(vec!["\"128KiB\"", "\"1.5MB\"", "\"0\"", "\"99999999TiB\"", "\"1b\"", "\"k\""]);
    let place = select(vec![
        "\"/ip4/1.2.3.4/tcp/1\"",
        "\"/ip4/127.0.0.1/tcp/0\"",
        "\"/dns4/relay.example.org/tcp/4001\"",
        "\"10.0.0.0/8\"",
        "\"10.0.0.1/8\"",
        "\"2001:db8::/32\"",
        "\"::ffff:10.0.0.0/104\"",
        "\"12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g\"",
        "\"127.0.0.1:9180\"",
        "\"[::1]:80\"",
        "\"relay.key\"",
        "\"a,b\"",
        "\"/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.5/tcp/2\"",
        "\"\"",
        "\"-\"",
        "\"--help\"",
        "'a\"b\\c'",
        "\"a\\nb\"",
        "\"\\u0000\"",
        "\"ä ö\"",
        "\"/ip4/1.2.3.4/tcp/1/p2p/12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g\"",
        "\"/unix/a%2Fb\"",
        "\"/ip6zone/x/ip6/::1/tcp/1\"",
    ]);
    let text = ".{0,12}".prop_map(|text| toml::Value::String(text).to_string());
    let value = prop_oneof![
        number.prop_map(str::to_owned),
        time.prop_map(str::to_owned),
        size.prop_map(str::to_owned),
        place.clone().prop_map(str::to_owned),
        text,
    ];
    let list = vec(place, 0..4).prop_map(|list| format!("[{}]", list.join(", ")));
    let setting = prop_oneof![
        6 => (select(names), value.clone()),
        3 => (select(lists.map(str::to_owned).to_vec()), list),
        1 => ("[a-z-]{0,12}|\"[^\"]{0,6}\"", value),
    ];
    // Few at a time, or nearly every file would be invalid.
    vec(setting, 0..4).prop_map(|settings| {
        let lines = settings.iter().map(|(name, value)| format!("{name} = {value}\n"));
        lines.collect::<String>().into_bytes()
    })
}
