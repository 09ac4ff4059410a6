//! The systemd unit, OpenWrt's init script, the container image and the documented proxies, tested with systemd's tools,
//! stubs of procd's functions, the steps that Docker would execute, HAProxy and nginx.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::Instant,
};

use crate::common::{
    Client, Relay, TEST_TIMEOUT,
    child_process::resident,
    free_port,
    pages::{Block, blocks, commands},
    websocket,
};
use libp2p::Multiaddr;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_relaylet");

// ---- The systemd unit

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_is_valid() {
    let verify = |unit: &str| {
        let folder = TempDir::new().unwrap();
        let output = analyze(&["verify", "--recursive-errors=no"], unit, &folder);
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.success() && errors.is_empty(), errors)
    };
    let (valid, errors) = verify(&unit());
    assert!(valid, "{errors}");
    // A mistake in the unit is reported.
    let misspelt = unit().replace("ProtectHome=", "ProtectHouse=");
    assert!(verify(&misspelt).1.contains("ProtectHouse"));
}

#[test]
#[ignore = "needs systemd-analyze"]
fn the_unit_has_a_low_exposure_score() {
    let is_within_threshold = |unit: &str| {
        let folder = TempDir::new().unwrap();
        let check = ["security", "--offline=true", "--threshold=20"]; // of 100
        analyze(&check, unit, &folder).status.success()
    };
    assert!(is_within_threshold(&unit()));
    assert!(!is_within_threshold(&unit().replace("\nProtect", "\n#Protect")));
}

/// Prints the parameters that the init script passes to OpenWrt's procd.
const PROCD: &str = r#"
procd_open_instance() { :; }
procd_close_instance() { :; }
procd_set_param() { echo "$*"; }
procd_send_signal() { echo "signal $*"; }
. "$SCRIPT" && start_service && start_service >"$FOLDER/second" && reload_service
"#;

#[test]
#[ignore = "needs root, to give files away"]
fn the_openwrt_script_runs_the_relay_with_little_memory_and_keeps_its_settings() {
    let folder = TempDir::new().unwrap();
    let output = run(Command::new("sh")
        .args(["-euc", PROCD])
        .env("SCRIPT", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/deploy/relaylet.init"))
        .env("PROGRAM", PROGRAM)
        .env("FOLDER", folder.path()));
    let parameter = |name: &str| {
        let found = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("no {name}: {output}"))
    };
    assert_eq!((parameter("user"), parameter("signal")), ("nobody", "relaylet * HUP"));
    let metadata = fs::metadata(folder.path().join("relaylet.toml")).unwrap();
    assert!(metadata.uid() > 0);
    let mut words = parameter("command").split(' ');
    let mut command = Command::new(words.next().expect("the program"));
    let printed = run(command.args(words).arg("--print-config"));
    assert!(printed.contains("memory = 25165824\n"), "{printed}");
}

#[test]
#[ignore = "needs root and systemd-nspawn"]
fn systemd_runs_the_relay_as_an_unprivileged_user() {
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
    assert_eq!(identity("status again"), peer, "the identity is kept after a restart");
    let user = value("user");
    assert_ne!(user, "0");
    assert_eq!(value("key"), format!("{user} 600"));
    assert_eq!(value("capabilities"), "0000000000000000");
    assert_eq!(value("seccomp"), "2");
    assert_eq!(value("setting"), "7");
    assert_eq!(value("nice"), "19", "the HTTP thread has the lowest priority");
    assert_eq!(value("reload of a file with an error"), "failed");
    assert_eq!(value("reload"), "done");
    assert_eq!(identity("status at 443"), peer);
    assert_eq!(value("capabilities at 443"), "0000000000000400", "CAP_NET_BIND_SERVICE alone");
    assert_eq!(identity("status without netlink"), peer);
    assert_eq!(value("result"), "success");
    let journal: Vec<_> = output.lines().filter(|line| line.starts_with("journal=")).collect();
    let count_logged = |text: &str| journal.iter().filter(|line| line.contains(text)).count();
    let each_time = (count_logged(&format!("is {peer}")), count_logged("SIGTERM: draining"));
    assert_eq!(each_time, (4, 4), "{journal:#?}");
    let without_netlink =
        ["listing this machine's addresses failed", "listening on /ip4/0.0.0.0/tcp/4001/p2p/"];
    assert_eq!(without_netlink.map(count_logged), [1; 2], "{journal:#?}");
    let changes = [
        "SIGHUP: grace: \"20s\" → \"10s\"",
        "private network",
        "listening on /ip4/127.0.0.1/tcp/443/",
    ];
    assert_eq!(changes.map(count_logged), [1, 2, 1], "{journal:#?}");
    let warnings: Vec<_> = output.lines().filter(|line| line.starts_with("warning=")).collect();
    let expected =
        count_logged("can be dialed from the internet") + count_logged(without_netlink[0]);
    assert_eq!(warnings.len(), expected, "by their priority: {warnings:#?}, {journal:#?}");
}

/// The unit, with the path of the tested program.
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

// ---- The container image

/// The limits: on the size of the program, in bytes, and on its memory before any client has connected, in KiB.
const LARGEST: u64 = 7_700_000;
const MOST_RESIDENT: u64 = 10 * 1024;

#[tokio::test]
#[ignore = "needs root; builds a release"]
async fn two_containers_on_one_volume_are_one_relay() {
    let folder = TempDir::new().unwrap();
    let image = Image::build(&folder.path().join("build"));
    assert_eq!(image.files(), ["data", "relaylet"]);
    assert_eq!(image.setting("EXPOSE"), "4001");
    assert_eq!(image.setting("VOLUME"), "/data");
    assert_eq!(image.setting("ENTRYPOINT"), r#"["/relaylet"]"#);
    let check = r#"CMD ["/relaylet", "check", "--quick", "/ip4/127.0.0.1/tcp/4001"]"#;
    assert_eq!(image.setting("HEALTHCHECK"), check);
    let user: u32 = image.setting("USER").split(':').next().unwrap().parse().unwrap();
    assert_ne!(user, 0);
    let program = fs::metadata(image.root.join("relaylet")).unwrap();
    assert!(program.len() < LARGEST, "{} bytes", program.len());

    // A new volume starts as a copy of the image's folder.
    let volume = folder.path().join("volume");
    copy(&image.root.join("data"), &volume);
    let mut first = image.run(&volume);
    let resident = resident(first.pid());
    assert!(resident < MOST_RESIDENT, "{resident} KiB");
    Client::connect(&first).await.reserve().await;
    let mut check = Command::new("chroot");
    // Within the running container, as the engine runs it.
    check.args(["--userspec", image.setting("USER"), &format!("/proc/{}/root", first.pid())]);
    let printed = run(check.args(["/relaylet", "check", "--quick", &first.address.to_string()]));
    assert!(printed.contains("\nend "), "{printed}");
    let key = fs::metadata(volume.join("relaylet.key")).unwrap();
    assert_eq!((key.uid(), key.mode() & 0o777), (user, 0o600));
    first.signal("TERM"); // as `docker stop` does
    assert!(first.wait().success());

    let second = image.run(&volume);
    assert_eq!(second.peer, first.peer);
    Client::connect(&second).await.reserve().await;
    let other_volume = folder.path().join("other_volume");
    copy(&image.root.join("data"), &other_volume);
    assert_ne!(image.run(&other_volume).peer, first.peer);
}

/// The image built from the Dockerfile.
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

    /// Runs a container: the image's files, devices, /proc and the volume.
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

/// A program that serves a port of 127.0.0.1; ended with its test.
pub struct Server {
    process: Child,
    pub port: u16,
    #[expect(dead_code, reason = "its configuration")]
    folder: TempDir,
}

impl Server {
    /// Runs the command, configured by what is in `folder` to serve this port, and waits until it does.
    pub fn start(command: &mut Command, folder: TempDir, port: u16) -> Self {
        let process = command.spawn().expect("it is installed");
        let (server, start) = (Self { process, port, folder }, Instant::now());
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(start.elapsed() < TEST_TIMEOUT, "{command:?} does not listen");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // With SIGTERM, because nginx's master then ends its workers.
        crate::common::signal(self.process.id(), "TERM");
        let _ = self.process.wait();
    }
}

/// The code block of the documentation that contains this word.
pub fn documented(language: &str, word: &str) -> String {
    let is_it = |block: &Block| block.text.contains(word);
    blocks(language).into_iter().find(is_it).expect("a documented block").text
}

/// A relay started by the documented command that contains this word, on a free port. Returns that port, and one for the
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

/// Starts HAProxy or nginx with this configuration, adapted to these ports, after a check of its syntax.
fn start_proxy(program: &str, configuration: &str, [relay, own]: [u16; 2]) -> Server {
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
    Server::start(Command::new(program).args(start), folder, own)
}

/// A complete configuration of nginx around a block.
fn nginx(block: &str, folder: &str) -> String {
    format!(
        "include /etc/nginx/modules-enabled/*.conf;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n{block}"
    )
}

#[tokio::test]
#[ignore = "needs haproxy, nginx and libnginx-mod-stream"]
async fn the_documented_tcp_proxies_pass_client_addresses_to_the_relay() {
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
        Client::connect_to(&through).await.reserve().await;
        println!("{program}: a slot through it");
    }
}

#[tokio::test]
#[ignore = "needs nginx"]
async fn the_documented_http_proxy_passes_client_addresses_to_the_relay() {
    let folder = TempDir::new().unwrap();
    let (relay, ports) = documented_relay("--trust-forwarded-from");
    let location = documented("nginx", "location / {");
    let logs = "access_log off;";
    let server = format!("http {{ {logs} server {{ listen 127.0.0.1:4001; {location} }} }}");
    let configuration = nginx(&server, folder.path().to_str().unwrap());
    let _proxy = start_proxy("nginx", &configuration, ports);
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}/ws", ports[1]).parse().unwrap();
    websocket::connect(&through.with_p2p(relay.peer).unwrap()).await.reserve().await;
    // The relay logs a missing header.
    assert_eq!(relay.count_in_log("X-Forwarded-For header"), 0, "{:#?}", relay.log());
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").args([from, to]));
}

/// Runs a command, which must succeed, and returns its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("the command starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
