//! Certificates: which are accepted, what both sides are told of those that are not, and how files
//! that change are read again.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType, date_time_ymd,
};
use tempfile::TempDir;

use super::impostors::behind_the_certificate_of;
use super::*;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// What a certificate says, where it is not as all others.
#[derive(Clone, Copy)]
struct Says<'a> {
    dns: &'a str,
    uri: &'a str,
    from: i32,
    until: i32,
    usages: &'a [ExtendedKeyUsagePurpose],
}

const BOTH: &[ExtendedKeyUsagePurpose] =
    &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
const GOOD: Says<'_> = Says {
    dns: "worker",
    uri: "spiffe://example.org/ns/train/sa/worker",
    from: 2020,
    until: 4000,
    usages: BOTH,
};

/// A folder with a certificate and its key, and the CA that is to sign the others'.
fn folder(signer: &Authority, trusted: &Authority, says: Says<'_>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), signer, says);
    fs::write(folder.path().join("ca.crt"), trusted.pem()).unwrap();
    folder
}

fn write(folder: &Path, signer: &Authority, says: Says<'_>) {
    let mut params = CertificateParams::new(vec![says.dns.to_owned()]).unwrap();
    params.subject_alt_names.push(SanType::URI(says.uri.try_into().unwrap()));
    params.not_before = date_time_ymd(says.from, 1, 1);
    params.not_after = date_time_ymd(says.until, 1, 1);
    params.extended_key_usages = says.usages.to_vec();
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, signer).unwrap();
    // As Kubernetes and cert-manager do it: whole files that replace others at once.
    for (name, text) in [("tls.crt", certificate.pem()), ("tls.key", key.serialize_pem())] {
        fs::write(folder.join("new"), text).unwrap();
        fs::rename(folder.join("new"), folder.join(name)).unwrap();
    }
}

fn files(folder: &TempDir, peers: Peers) -> Files {
    let at = |name| folder.path().join(name);
    Files { certificate: at("tls.crt"), key: at("tls.key"), authorities: at("ca.crt"), peers }
}

fn certified(folder: &TempDir, peers: Peers) -> Credentials {
    let secret = Secret::new(b"token");
    Credentials::certified(secret, Sealing::Everywhere, files(folder, peers)).unwrap()
}

fn names(names: &str) -> Peers {
    names.parse().unwrap()
}

/// What the dialer and the listener are told.
fn told(dialer: &Credentials, listener: &Credentials) -> (String, String) {
    let mut wire = Wire::new(listener);
    let error = match wire.dial(dialer) {
        Ok(_) => "admitted".to_owned(),
        Err(error) => {
            assert!(error.is_answer(), "it would be tried again: {error}");
            error.to_string()
        }
    };
    let heard = match wire.last {
        Heard::Refused(refusal, _) => refusal.to_string(),
        Heard::Admitted(..) => "admitted".to_owned(),
        heard => format!("{heard:?}"),
    };
    (error, heard)
}

#[test]
fn certificates_of_the_ca_and_with_the_right_name_are_admitted() {
    let ca = authority();
    let one = folder(&ca, &ca, GOOD);
    for peers in [Peers::Any, names("other, worker"), names(GOOD.uri), names("WORKER")] {
        let credentials = certified(&one, peers);
        let mut wire = Wire::new(&credentials);
        let mut dialer = wire.dial(&credentials).unwrap().unwrap();
        let mut listener = wire.listening.take_session().unwrap();
        assert!(wire.was_admitted() && understand_each_other(&mut dialer, &mut listener));
    }
}

#[test]
fn the_token_is_needed_beside_a_certificate() {
    let ca = authority();
    let one = folder(&ca, &ca, GOOD);
    let another = Secret::new(b"another");
    let files = files(&one, Peers::Any);
    let another = Credentials::certified(another, Sealing::Everywhere, files).unwrap();
    let (dialer, listener) = told(&another, &certified(&one, Peers::Any));
    assert_eq!((&dialer[..], &listener[..]), ("refused: wrong token", "wrong token"));
}

fn assert_is_for_another_use(bad: &Credentials, good: &Credentials) {
    for (dialer, listener) in [(bad, good), (good, bad)] {
        let told = told(dialer, listener);
        let (of_bad, by_good) = if std::ptr::eq(dialer, bad) { told } else { (told.1, told.0) };
        assert!(by_good.contains("its certificate is not for this use"), "{by_good}");
        assert!(of_bad.contains("this rank's certificate is not for this use"), "{of_bad}");
    }
}

/// One sentence on each side, whichever of the two has the fault.
#[test]
fn what_is_wrong_with_a_certificate_is_told_on_both_sides() {
    let (ca, other_ca) = (authority(), authority());
    let good = certified(&folder(&ca, &ca, GOOD), names("worker"));
    let server_only = &[ExtendedKeyUsagePurpose::ServerAuth][..];
    let client_only = &[ExtendedKeyUsagePurpose::ClientAuth][..];
    let cases = [
        (folder(&ca, &ca, Says { until: 2021, ..GOOD }), "its certificate has expired"),
        (folder(&ca, &ca, Says { from: 3000, ..GOOD }), "its certificate is not valid yet"),
        (folder(&other_ca, &ca, GOOD), "not signed by a CA of UNISUM_TLS_CA"),
        (
            folder(&ca, &ca, Says { dns: "stranger", uri: "spiffe://example.org/x", ..GOOD }),
            "names stranger, spiffe://example.org/x, which this rank does not accept",
        ),
    ];
    let of_others = ["has expired, or is not", "CA that it knows", "accept the names in this rank"];
    for (folder, why) in cases {
        let bad = certified(&folder, Peers::Any);
        let (dialer, listener) = told(&bad, &good);
        assert!(listener.contains(why), "{listener}");
        assert!(of_others.iter().any(|part| dialer.contains(part)), "{why}: {dialer}");
        let (dialer, listener) = told(&good, &bad);
        assert!(dialer.contains(why), "{dialer}");
        assert!(of_others.iter().any(|part| listener.contains(part)), "{why}: {listener}");
    }
    // Whoever dials: a rank that is refused only by those that it listens to would join, and be
    // missed by a group or a view much later.
    for usages in [server_only, client_only] {
        let bad = certified(&folder(&ca, &ca, Says { usages, ..GOOD }), Peers::Any);
        assert_is_for_another_use(&bad, &good);
    }
    // Who has none at all.
    let alike = "UNISUM_TLS must be the same on all ranks";
    let (dialer, listener) = told(&good, &token("token"));
    assert!(dialer != "admitted", "{dialer}");
    assert!(dialer.contains(alike) && listener.contains(alike), "{dialer}, {listener}");
    let (dialer, listener) = told(&token("token"), &good);
    assert!(dialer != "admitted" && listener != "admitted", "{dialer}, {listener}");
    assert!(dialer.contains(alike) && listener.contains(alike), "{dialer}, {listener}");
}

#[test]
fn certificates_of_cas_and_by_others_than_cas_are_for_another_use() {
    let ca = authority();
    let good = certified(&folder(&ca, &ca, GOOD), names("worker"));
    let put = |folder: &TempDir, chain: &str, key: &KeyPair| {
        fs::write(folder.path().join("tls.crt"), chain).unwrap();
        fs::write(folder.path().join("tls.key"), key.serialize_pem()).unwrap();
    };
    // A CA's own.
    let own = folder(&ca, &ca, GOOD);
    put(&own, &ca.pem(), ca.key());
    assert_is_for_another_use(&certified(&own, Peers::Any), &good);
    // One that a rank has signed, which the CA has not made a CA.
    let named = |name: &str| CertificateParams::new(vec![name.to_owned()]).unwrap();
    let mut of_rank = named("worker");
    of_rank.is_ca = IsCa::ExplicitNoCa;
    of_rank.distinguished_name.push(rcgen::DnType::CommonName, "rank");
    let rank = CertifiedIssuer::signed_by(of_rank, KeyPair::generate().unwrap(), &ca);
    let (rank, key) = (rank.unwrap(), KeyPair::generate().unwrap());
    let below = named("worker").signed_by(&key, &rank).unwrap();
    let by_rank = folder(&ca, &ca, GOOD);
    put(&by_rank, &(below.pem() + &rank.pem()), &key);
    assert_is_for_another_use(&certified(&by_rank, Peers::Any), &good);
}

/// Certificates are no secret: whoever has seen one may show it.
#[test]
fn who_shows_the_certificate_of_another_rank_is_refused_at_either_end() {
    let ca = authority();
    let [shown, own] = [(); 2].map(|()| certified(&folder(&ca, &ca, GOOD), names("worker")));
    let impostor = behind_the_certificate_of(&shown, &own);
    let (_, listener) = told(&impostor, &own);
    assert!(listener.contains("its certificate"), "{listener}");
    let (dialer, _) = told(&own, &impostor);
    assert!(dialer.contains("its certificate"), "{dialer}");
    let alike = behind_the_certificate_of(&own, &own);
    for (dialer, listener) in [(&alike, &own), (&own, &alike)] {
        assert_eq!(told(dialer, listener), ("admitted".into(), "admitted".into()));
    }
}

#[test]
fn a_certificate_without_names_is_told_what_counts() {
    let ca = authority();
    let good = certified(&folder(&ca, &ca, GOOD), names("worker"));
    let nameless = folder(&ca, &ca, GOOD);
    let mut params = CertificateParams::new(vec!["10.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "worker");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &ca).unwrap();
    fs::write(nameless.path().join("tls.crt"), certificate.pem()).unwrap();
    fs::write(nameless.path().join("tls.key"), key.serialize_pem()).unwrap();
    let (_, listener) = told(&certified(&nameless, Peers::Any), &good);
    assert!(listener.contains("names nobody") && listener.contains("common names"), "{listener}");
}

#[test]
fn files_are_read_again_when_they_change_and_kept_if_they_make_no_sense() {
    let (ca, later_ca) = (authority(), authority());
    let one = folder(&ca, &ca, Says { until: 2021, ..GOOD });
    let peers = one.path().join("peers");
    fs::write(&peers, "worker\nhelper\n").unwrap();
    let credentials = certified(&one, names(&format!("@{}", peers.display())));
    assert!(told(&credentials, &credentials).1.contains("has expired"));
    write(one.path(), &ca, GOOD);
    assert_eq!(told(&credentials, &credentials), ("admitted".into(), "admitted".into()));
    // Half a rotation: certificate and key of different pairs. What was there before still serves.
    let other = folder(&ca, &ca, GOOD);
    fs::copy(other.path().join("tls.key"), one.path().join("tls.key")).unwrap();
    assert_eq!(told(&credentials, &credentials).0, "admitted");
    // The other half, of another CA.
    fs::write(one.path().join("ca.crt"), later_ca.pem()).unwrap();
    fs::copy(other.path().join("tls.crt"), one.path().join("tls.crt")).unwrap();
    assert!(told(&credentials, &credentials).0.contains("not signed by a CA"));
    fs::write(one.path().join("ca.crt"), ca.pem()).unwrap();
    assert_eq!(told(&credentials, &credentials).0, "admitted");
    // Who is taken out of the list comes in no more.
    fs::write(&peers, "helper\n").unwrap();
    assert!(told(&credentials, &credentials).1.contains("does not accept"));
    fs::remove_file(&peers).unwrap();
    assert!(told(&credentials, &credentials).1.contains("does not accept"));
}

#[test]
fn what_is_wrong_with_a_file_is_told() {
    let ca = authority();
    let one = folder(&ca, &ca, GOOD);
    let error = |change: &dyn Fn(&mut Files)| {
        let mut files = files(&one, Peers::Any);
        change(&mut files);
        let made = Credentials::certified(Secret::new(b"token"), Sealing::Everywhere, files);
        made.err().map(|error| error.to_string()).unwrap()
    };
    let missing = error(&|files| files.certificate = "/nowhere/tls.crt".into());
    assert_eq!(missing, "certificate /nowhere/tls.crt: no such file");
    let no_key = error(&|files| files.key = files.certificate.clone());
    assert!(no_key.starts_with("key /") && no_key.contains("PEM is expected"), "{no_key}");
    let no_ca = error(&|files| files.authorities = files.key.clone());
    assert!(no_ca.starts_with("CA certificates /"), "{no_ca}");
    let other = folder(&ca, &ca, GOOD);
    let pair = error(&|files| files.key = other.path().join("tls.key"));
    assert!(pair.contains("it does not go with"), "{pair}");
    let of_key = |text: &str| {
        let key = one.path().join("odd.key");
        fs::write(&key, text).unwrap();
        error(&|files| files.key = key.clone())
    };
    let pem = fs::read_to_string(one.path().join("tls.key")).unwrap();
    let marked = pem.replacen("BEGIN PRIVATE", "BEGIN ENCRYPTED PRIVATE", 1);
    let old = pem.replacen("KEY-----\n", "KEY-----\nProc-Type: 4,ENCRYPTED\n\n", 1);
    for text in [marked, old] {
        assert!(of_key(&text).contains("it is encrypted"), "{}", of_key(&text));
    }
    let cut = of_key(pem.rsplit_once("-----END").unwrap().0);
    assert!(cut.contains("cut off: `-----END PRIVATE KEY-----` is missing"), "{cut}");
    let odd = of_key("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    assert!(odd.contains("its kind is not supported, or it is damaged"), "{odd}");
    let odd = of_key("-----BEGIN PRIVATE KEY-----\n!\n-----END PRIVATE KEY-----\n");
    assert!(odd.contains("it is not base64"), "{odd}");
    for text in ["", "a,,b", "@"] {
        assert!(text.parse::<Peers>().is_err(), "{text}");
    }
}

/// A pipe, a folder, or a device in the place of a file holds nobody up, at the start or later.
#[test]
fn what_is_no_file_is_refused_at_once() {
    let ca = authority();
    let one = folder(&ca, &ca, GOOD);
    let pipe = one.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let huge = one.path().join("huge");
    fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    let own = files(&one, Peers::Any);
    for (path, why) in [
        (&pipe, "it is not a regular file"),
        (&one.path().to_owned(), "it is not a regular file"),
        (&"/dev/zero".into(), "it is not a regular file"),
        (&huge, "it has more than 4 MiB"),
    ] {
        let changed = [
            Files { certificate: path.clone(), ..own.clone() },
            Files { key: path.clone(), ..own.clone() },
            Files { authorities: path.clone(), ..own.clone() },
            Files { peers: Peers::File(path.clone()), ..own.clone() },
        ];
        for files in changed {
            let made = Credentials::certified(Secret::new(b"token"), Sealing::Everywhere, files);
            let error = made.err().unwrap().to_string();
            assert!(error.ends_with(&format!("{}: {why}", path.display())), "{error}");
        }
    }
    let credentials = certified(&one, Peers::Any);
    fs::rename(&pipe, one.path().join("tls.crt")).unwrap();
    assert_eq!(told(&credentials, &credentials).0, "admitted");
}

#[test]
fn lists_of_peers_may_have_comments_and_commas_but_nothing_odd() {
    let ca = authority();
    let one = folder(&ca, &ca, GOOD);
    let list = one.path().join("peers");
    let with = |text: &[u8]| {
        fs::write(&list, text).unwrap();
        let files = files(&one, Peers::File(list.clone()));
        Credentials::certified(Secret::new(b"token"), Sealing::Everywhere, files)
    };
    for text in ["\u{feff}worker\r\n", "# ours, all of them\nother, worker\n"] {
        let good = with(text.as_bytes()).unwrap();
        assert_eq!(told(&good, &good).0, "admitted", "{text}");
    }
    let nobody = with(b"# worker\n").unwrap();
    assert!(told(&nobody, &nobody).1.contains("does not accept"));
    for (text, what) in [
        (&b"worker\nother worker\n"[..], "`other worker` is no name"),
        (b"worker # not this\n", "`worker # not this` is no name"),
        (b"\xff\n", "it is not UTF-8"),
    ] {
        let error = with(text).err().unwrap().to_string();
        assert!(error.starts_with("list of peers /") && error.contains(what), "{error}");
    }
}
