//! The service and the image, by the tools that they are for: systemd, and what Docker would do.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::Instant,
};

use crate::common::{
    Client, PATIENCE, Relay, Security,
    pages::{Block, blocks, commands},
    websocket,
};
use libp2p::{Multiaddr, identity::Keypair};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_relaylet");

// ---- The service

/// How large the program may get, in bytes, and how much memory it may take before anyone has come.
const LARGEST: u64 = 6_000_000;
const MOST_RESIDENT: u64 = 10 * 1024 * 1024;

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_is_valid() {
    let verify = |unit: &str| {
        let folder = TempDir::new().unwrap();
        let output = analyze(&["verify", "--recursive-errors=no"], unit, &folder);
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.success() && said.is_empty(), said)
    };
    let (valid, said) = verify(&unit());
    assert!(valid, "{said}");
    // It says so if there is something to say.
    let misspelt = unit().replace("ProtectHome=", "ProtectHouse=");
    assert!(verify(&misspelt).1.contains("ProtectHouse"));
}

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_exposes_little() {
    let exposes_little = |unit: &str| {
        let folder = TempDir::new().unwrap();
        let judge = ["security", "--offline=true", "--threshold=20"]; // of 100
        analyze(&judge, unit, &folder).status.success()
    };
    assert!(exposes_little(&unit()));
    assert!(!exposes_little(&unit().replace("\nProtect", "\n#Protect")));
}

#[test]
#[ignore = "needs root and systemd-nspawn"]
fn systemd_runs_it_as_somebody_who_may_do_nothing_else() {
    let folder = TempDir::new().unwrap();
    let output = run(Command::new("tests/deploy/boot").arg(PROGRAM).arg(folder.path()));
    let value = |name: &str| {
        let found = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("no {name}: {output}"))
    };
    assert_eq!(value("active"), "active");
    let identity = |name: &str| {
        let (used, peer) = value(name).split_once(" slots, 0 circuits; peer id ").expect(&output);
        assert!(used.starts_with("0 of ") && peer.starts_with("12D3"), "{output}");
        peer.to_owned()
    };
    let peer = identity("status");
    assert_eq!(identity("status again"), peer, "who it is outlasts a restart");
    let user = value("user");
    assert_ne!(user, "0");
    assert_eq!(value("key"), format!("{user} 600"));
    assert_eq!(value("capabilities"), "0000000000000000");
    assert_eq!(value("seccomp"), "2");
    assert_eq!(value("setting"), "7");
    assert_eq!(value("nice"), "19", "what is shown over HTTP comes last");
    assert_eq!(value("reload of a file with an error"), "failed");
    assert_eq!(value("reload"), "done");
    assert_eq!(identity("status at 443"), peer);
    assert_eq!(value("capabilities at 443"), "0000000000000400", "CAP_NET_BIND_SERVICE alone");
    assert_eq!(identity("status without netlink"), peer);
    assert_eq!(value("result"), "success");
    let journal: Vec<_> = output.lines().filter(|line| line.starts_with("journal=")).collect();
    let says = |text: &str| journal.iter().filter(|line| line.contains(text)).count();
    let each_time = (says(&format!("is {peer}")), says("SIGTERM: draining"));
    assert_eq!(each_time, (4, 4), "{journal:#?}");
    let untold =
        ["listing this machine's addresses failed", "listening on /ip4/0.0.0.0/tcp/4001/p2p/"];
    assert_eq!(untold.map(says), [1; 2], "{journal:#?}");
    let changes = [
        "SIGHUP: grace: \"20s\" → \"10s\"",
        "private network",
        "listening on /ip4/127.0.0.1/tcp/443/",
    ];
    assert_eq!(changes.map(says), [1, 2, 1], "{journal:#?}");
    assert_eq!(
        says(" WARN "),
        says("can be dialed from the internet") + says(untold[0]),
        "{journal:#?}"
    );
}

/// The unit, for the program of these tests.
fn unit() -> String {
    let unit = fs::read_to_string("tests/deploy/relaylet.service").unwrap();
    assert!(unit.contains("ExecStart=/usr/local/bin/relaylet\n"));
    unit.replace("/usr/local/bin/relaylet", PROGRAM)
}

fn analyze(arguments: &[&str], unit: &str, folder: &TempDir) -> Output {
    let file = folder.path().join("relaylet.service");
    fs::write(&file, unit).unwrap();
    let mut command = Command::new("systemd-analyze");
    let output = command.args(arguments).arg(file).output();
    output.expect("systemd-analyze can be run")
}

// ---- The image

#[tokio::test]
#[ignore = "needs root; builds a release"]
async fn two_containers_on_one_volume_are_one_relay() {
    let folder = TempDir::new().unwrap();
    let image = Image::build(&folder.path().join("build"));
    assert_eq!(image.files(), ["data", "relaylet"]);
    assert_eq!(image.setting("EXPOSE"), "4001");
    assert_eq!(image.setting("VOLUME"), "/data");
    assert_eq!(image.setting("ENTRYPOINT"), r#"["/relaylet"]"#);
    let user: u32 = image.setting("USER").split(':').next().unwrap().parse().unwrap();
    assert_ne!(user, 0);
    let program = fs::metadata(image.root.join("relaylet")).unwrap();
    assert!(program.len() < LARGEST, "{} bytes", program.len());

    // A new volume begins as what the image has in its place.
    let volume = folder.path().join("volume");
    copy(&image.root.join("data"), &volume);
    let mut first = image.run(&volume);
    let resident = resident(first.pid());
    assert!(resident < MOST_RESIDENT, "{resident} bytes");
    Client::connect(&first).await.reserve().await;
    let key = fs::metadata(volume.join("relaylet.key")).unwrap();
    assert_eq!((key.uid(), key.mode() & 0o777), (user, 0o600));
    first.signal("TERM"); // as `docker stop` does
    assert!(first.wait().success());

    let second = image.run(&volume);
    assert_eq!(second.peer, first.peer);
    Client::connect(&second).await.reserve().await;
    let elsewhere = folder.path().join("elsewhere");
    copy(&image.root.join("data"), &elsewhere);
    assert_ne!(image.run(&elsewhere).peer, first.peer);
}

/// How much memory a process has now, in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() * 1024
}

/// What the Dockerfile makes.
struct Image {
    root: PathBuf,
    settings: String,
}

impl Image {
    fn build(folder: &Path) -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image");
        run(Command::new("tests/deploy/build-image").arg(folder).env("CARGO_TARGET_DIR", target));
        Self {
            root: folder.join("image"),
            settings: fs::read_to_string(folder.join("settings")).unwrap(),
        }
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.root).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn setting(&self, name: &str) -> &str {
        let mut lines = self.settings.lines();
        let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("no {name}: {}", self.settings))
    }

    /// A container: the image's files and nothing else, but for devices, /proc and the volume.
    fn run(&self, volume: &Path) -> Relay {
        const CONTAINER: &str = r#"
            set -e
            mount -t tmpfs tmpfs "$1"
            cp -a "$2/." "$1"
            mkdir "$1/dev" "$1/proc"
            mount --rbind /dev "$1/dev"
            mount -t proc proc "$1/proc"
            mount --bind "$3" "$1/data"
            exec chroot --userspec "$4" "$1" /relaylet --listen /ip4/127.0.0.1/tcp/0
        "#;
        let folder = TempDir::new().unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", CONTAINER, "sh"])
            .args([folder.path(), &self.root, volume])
            .arg(self.setting("USER"))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        for line in self.settings.lines() {
            if let Some((name, value)) =
                line.strip_prefix("ENV ").and_then(|env| env.split_once('='))
            {
                command.env(name, value);
            }
        }
        Relay::run(command, folder)
    }
}

// ---- Proxies, configured as the documentation says

/// A proxy that runs, and is killed with its test.
struct Proxy(Child, #[expect(dead_code, reason = "its configuration")] TempDir);

impl Drop for Proxy {
    fn drop(&mut self) {
        // nginx's master ends its workers when it is asked to end.
        crate::common::signal(self.0.id(), "TERM");
        let _ = self.0.wait();
    }
}

/// The block of the page that has this word in it.
fn documented(language: &str, word: &str) -> String {
    let is_it = |block: &Block| block.text.contains(word);
    blocks(language).into_iter().find(is_it).expect("it is in the documentation").text
}

/// A relay started by the command of the page that has this word in it, on ports of this test: those of the relay and of the
/// proxy in front of it.
fn documented_relay(word: &str) -> (Relay, [u16; 2]) {
    let page = blocks("sh");
    let all = page.iter().flat_map(|block| commands(&block.text));
    let command = all.into_iter().find(|line| line.starts_with("relaylet") && line.contains(word));
    let ports = [free_port(), free_port()];
    let command = command.expect("a command").replace("tcp/4002", &format!("tcp/{}", ports[0]));
    let words: Vec<_> = command.split_whitespace().skip(1).collect();
    (Relay::start_listening(&words), ports)
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts HAProxy or nginx with this configuration, on these ports, once it says that it is valid.
fn start_proxy(program: &str, configuration: &str, [relay, own]: [u16; 2]) -> Proxy {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("proxy.conf");
    let on_ports = configuration
        .replace("127.0.0.1:4002", &format!("127.0.0.1:{relay}"))
        .replace("4001", &own.to_string());
    fs::write(&file, on_ports).unwrap();
    let file = file.to_str().unwrap();
    let (check, start): (&[&str], &[&str]) = match program {
        "haproxy" => (&["-c", "-f", file], &["-db", "-f", file]),
        _ => (&["-t", "-c", file], &["-c", file, "-g", "daemon off;"]),
    };
    run(Command::new(program).args(check));
    let proxy = Command::new(program).args(start).spawn().expect("it is installed");
    let (proxy, start) = (Proxy(proxy, folder), Instant::now());
    while std::net::TcpStream::connect(("127.0.0.1", own)).is_err() {
        assert!(start.elapsed() < PATIENCE, "{program} does not listen");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    proxy
}

/// nginx's file around a block of it.
fn nginx(block: &str, folder: &str) -> String {
    format!(
        "include /etc/nginx/modules-enabled/*.conf;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n{block}"
    )
}

#[tokio::test]
#[ignore = "needs haproxy, nginx and libnginx-mod-stream"]
async fn the_documented_tcp_proxies_name_their_clients_to_the_relay() {
    let folder = TempDir::new().unwrap();
    let stream = nginx(&documented("nginx", "stream {"), folder.path().to_str().unwrap());
    for (program, configuration) in
        [("haproxy", documented("haproxy", "send-proxy-v2")), ("nginx", stream)]
    {
        let (relay, ports) = documented_relay("--proxy-protocol-from");
        let _proxy = start_proxy(program, &configuration, ports);
        let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", ports[1]).parse().unwrap();
        let through = through.with_p2p(relay.peer).unwrap();
        // The relay closes a connection without a header.
        let keypair = Keypair::generate_ed25519();
        Client::connect_as(keypair, &through, Security::Noise).await.reserve().await;
        println!("{program}: a slot through it");
    }
}

#[tokio::test]
#[ignore = "needs nginx"]
async fn the_documented_http_proxy_names_its_clients_to_the_relay() {
    let folder = TempDir::new().unwrap();
    let (relay, ports) = documented_relay("--trust-forwarded-from");
    let location = documented("nginx", "location / {");
    let logs = "access_log off;";
    let server = format!("http {{ {logs} server {{ listen 127.0.0.1:4001; {location} }} }}");
    let configuration = nginx(&server, folder.path().to_str().unwrap());
    let _proxy = start_proxy("nginx", &configuration, ports);
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}/ws", ports[1]).parse().unwrap();
    websocket::connect(&through.with_p2p(relay.peer).unwrap()).await.reserve().await;
    // It would say so if the header were missing.
    assert_eq!(relay.count_in_log("X-Forwarded-For header"), 0, "{:#?}", relay.log());
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").args([from, to]));
}

/// What it says on standard output, once it ended well.
fn run(command: &mut Command) -> String {
    let output = command.output().expect("it can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
