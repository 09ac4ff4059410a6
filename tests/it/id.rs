//! `relaylet id`, the keys that it imports, and a key in the environment.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    process::{Output, Stdio},
};

use data_encoding::BASE64;
use libp2p::identity::Keypair;
use tempfile::TempDir;

use crate::common::{Relay, command, output};

/// An Ed25519 key of RFC 8410, 10.3, and its peer id.
const PEM: &str = "-----BEGIN PRIVATE KEY-----\n\
                   MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                   -----END PRIVATE KEY-----\n";

fn id(folder: &TempDir, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    output(command(folder).arg("id").args(arguments).envs(variables.iter().copied()))
}

/// The peer id that is printed, and nothing else.
fn printed(output: Output) -> String {
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(printed.lines().count(), 1, "{printed}");
    printed.trim_end().to_owned()
}

fn refused(output: Output, code: i32) -> String {
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn peer_id(keypair: &Keypair) -> String {
    keypair.public().to_peer_id().to_string()
}

#[test]
fn the_id_is_the_relays_and_its_key_is_created_once() {
    let folder = TempDir::new().unwrap();
    let first = printed(id(&folder, &[], &[]));
    let key = fs::metadata(folder.path().join("relaylet.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    assert_eq!(printed(id(&folder, &["--identity=relaylet.key"], &[])), first);
    assert_ne!(printed(id(&folder, &[], &[("RELAYLET_IDENTITY", "other.key")])), first);
    assert!(folder.path().join("other.key").exists());
    let relay = Relay::start_in(folder, &["--listen=/ip4/127.0.0.1/tcp/0"]);
    assert_eq!(relay.peer.to_string(), first);
}

#[test]
fn kubos_keys_and_pem_are_imported_and_no_key_is_overwritten() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let keypair = Keypair::generate_ed25519();
    let protobuf = keypair.to_protobuf_encoding().unwrap();
    let base64 = BASE64.encode(&protobuf);
    let config = format!("{{ \"Identity\": {{ \"PeerID\": \"\", \"PrivKey\": \"{base64}\" }} }}");
    let pem = Keypair::ed25519_from_bytes(
        BASE64.decode(PEM.lines().nth(1).unwrap().as_bytes()).unwrap().split_off(16),
    );
    let pem = pem.unwrap();
    for (name, content, expected) in [
        ("exported", &protobuf[..], &keypair),
        ("config", config.as_bytes(), &keypair),
        ("base64", base64.as_bytes(), &keypair),
        ("pem", PEM.as_bytes(), &pem),
    ] {
        fs::write(path(name), content).unwrap();
        let (import, to) = (format!("--import={name}"), format!("--identity={name}.key"));
        assert_eq!(printed(id(&folder, &[&import, &to], &[])), peer_id(expected));
        assert_eq!(
            fs::read(path(&format!("{name}.key"))).unwrap(),
            expected.to_protobuf_encoding().unwrap()
        );
        assert_eq!(printed(id(&folder, &[&to], &[])), peer_id(expected), "it is there now");
        assert_eq!(printed(id(&folder, &[&import, &to], &[])), peer_id(expected), "once more");
    }
    let other = refused(id(&folder, &["--import=pem", "--identity=config.key"], &[]), 1);
    assert!(other.contains("--identity config.key: holds another key; "), "{other}");
    assert_eq!(fs::read(path("config.key")).unwrap(), protobuf);
    let none = refused(id(&folder, &["--import=nowhere", "--identity=new.key"], &[]), 1);
    assert!(none.contains("--import nowhere: cannot be read; "), "{none}");
    fs::write(path("text"), "no key").unwrap();
    let none = refused(id(&folder, &["--import=text", "--identity=new.key"], &[]), 1);
    assert!(none.contains("--import text: holds no libp2p private key; "), "{none}");
    assert!(!path("new.key").exists());
    let wrong = refused(id(&folder, &["--improt=text"], &[]), 2);
    assert!(wrong.contains("--improt"), "{wrong}");
}

#[tokio::test]
async fn a_key_in_the_environment_overrides_the_key_file_and_creates_none() {
    let folder = TempDir::new().unwrap();
    let keypair = Keypair::generate_ed25519();
    let base64 = BASE64.encode(&keypair.to_protobuf_encoding().unwrap());
    let variable = ("RELAYLET_IDENTITY_KEY", &base64[..]);
    assert_eq!(printed(id(&folder, &[], &[variable])), peer_id(&keypair));
    let mut command = command(&folder);
    command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).env(variable.0, variable.1);
    let relay = Relay::run(command, folder);
    assert_eq!(relay.peer.to_string(), peer_id(&keypair));
    relay.wait_for_log("no public address").await;
    assert_eq!(relay.count_in_log("WARN"), 1, "{:#?}", relay.log());
    assert_eq!(fs::read_dir(relay.folder.path()).unwrap().count(), 0);
    assert_eq!(relay.count_in_log(&base64), 0);

    let folder = TempDir::new().unwrap();
    let wrong = refused(id(&folder, &[], &[("RELAYLET_IDENTITY_KEY", "CAESQ")]), 1);
    assert!(wrong.contains("RELAYLET_IDENTITY_KEY: holds no key; "), "{wrong}");
    assert!(!wrong.contains("CAESQ"), "{wrong}");
    // An empty one counts as not set.
    printed(id(&folder, &[], &[("RELAYLET_IDENTITY_KEY", "")]));
    assert!(folder.path().join("relaylet.key").exists());
}

#[test]
fn words_and_variables_that_are_not_utf8_are_an_error() {
    let folder = TempDir::new().unwrap();
    let name = OsStr::from_bytes(b"\xff.key");
    for words in [&[OsStr::from_bytes(b"--identity=\xff.key")][..], &["--x".as_ref(), name]] {
        let wrong = refused(output(command(&folder).arg("id").args(words)), 2);
        assert!(wrong.contains("is not UTF-8; write it as UTF-8"), "{wrong}");
    }
    let mut command = command(&folder);
    let wrong = refused(output(command.arg("id").env("RELAYLET_IDENTITY", name)), 2);
    assert!(wrong.contains("UTF-8"), "{wrong}");
}

#[test]
fn the_id_is_printed_even_if_a_warning_cannot_be() {
    let folder = TempDir::new().unwrap();
    let first = printed(id(&folder, &[], &[]));
    let key = folder.path().join("relaylet.key");
    fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    let full = fs::File::create("/dev/full").unwrap();
    let mut command = command(&folder);
    let output = command.arg("id").stdout(Stdio::piped()).stderr(full).spawn().unwrap();
    assert_eq!(printed(output.wait_with_output().unwrap()), first);
}
