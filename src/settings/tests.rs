use super::*;

fn read(pairs: &[(&'static str, &str)]) -> Result<Settings, SettingsError> {
    Settings::from_environment(&pairs.iter().copied().collect())
}

#[test]
fn the_documented_defaults_are_the_real_ones() {
    let written: Environment = VARIABLES.iter().map(|v| (v.name, v.default)).collect();
    assert_eq!(Settings::from_environment(&written), Ok(Settings::default()));
    assert_eq!(read(&[]), Ok(Settings::default()));
}

#[test]
fn the_documentation_has_every_variable_and_no_other() {
    let page = include_str!("../../docs/configuration.md");
    let written: Vec<_> = page.lines().filter(|line| line.starts_with("| `UNISUM_")).collect();
    let table: Vec<_> = VARIABLES
        .iter()
        .map(|variable| {
            let default = match variable.default {
                "" => "–".to_owned(),
                value => format!("`{value}`"),
            };
            format!("| `{}` | {default} | {} |", variable.name, variable.meaning)
        })
        .collect();
    assert_eq!(written, table, "rows for docs/configuration.md:\n{}", table.join("\n"));
}

#[test]
fn every_setting_is_read() {
    let settings = read(&[
        ("UNISUM_TIMEOUT", "1.5"),
        ("UNISUM_CONNECT_TIMEOUT", " 7 "),
        ("UNISUM_HEARTBEAT_TIMEOUT", "2.5"),
        ("UNISUM_RECONNECT_TIMEOUT", "30"),
        ("UNISUM_ELASTIC", "3"),
        ("UNISUM_MEMBERS", "/tmp/members"),
        ("UNISUM_EPOCH_LOG", "/tmp/log"),
        ("UNISUM_REPLAY", "/tmp/earlier"),
        ("UNISUM_REPLAY_PROCESS", "2147483653"),
        ("UNISUM_ALGORITHM", "Ring"),
        ("UNISUM_REPRODUCIBLE", "0"),
        ("UNISUM_TUNING", "/tmp/tuning"),
        ("UNISUM_TRANSPORT", "shm"),
        ("UNISUM_INTERFACE", "^docker"),
        ("UNISUM_PORT_RANGE", "20000-20010"),
        ("UNISUM_TCP_SOCKETS", "4"),
        ("UNISUM_SLICE_BYTES", "1M"),
        ("UNISUM_WINDOW", "8"),
        ("UNISUM_SHM_HEAP", "2G"),
        ("UNISUM_CMA", "off"),
        ("UNISUM_MULTIMEM", "on"),
        ("UNISUM_VERBS", "0"),
        ("UNISUM_VERBS_DEVICE", "=mlx5_0:1"),
        ("UNISUM_VERBS_GID_INDEX", "3"),
        ("UNISUM_VERBS_PAIRS", "4"),
        ("UNISUM_VERBS_MTU", "1K"),
        ("UNISUM_VERBS_TIMEOUT", "20"),
        ("UNISUM_VERBS_RETRIES", "6"),
        ("UNISUM_VERBS_TRAFFIC_CLASS", "106"),
        ("UNISUM_VERBS_SERVICE_LEVEL", "5"),
    ]);
    let expected = Settings {
        reproducible: false,
        tuning: Some("/tmp/tuning".into()),
        timeout: Duration::from_millis(1500),
        connect_timeout: Duration::from_secs(7),
        heartbeat_timeout: Duration::from_millis(2500),
        reconnect_timeout: Duration::from_secs(30),
        elastic: Some(3),
        members: Some("/tmp/members".into()),
        epoch_log: Some("/tmp/log".into()),
        replay: Some("/tmp/earlier".into()),
        replay_process: Some(2_147_483_653),
        algorithm: Some("ring".to_owned()),
        transport: TransportChoice(Some("shm".into())),
        custom: Custom::default(),
        interface: Some("^docker".parse().unwrap()),
        port_range: Some("20000-20010".parse().unwrap()),
        sockets_per_peer: 4,
        slice_bytes: 1 << 20,
        window: 8,
        shm_heap: Some(2 << 30),
        cross_memory: false,
        multimem: true,
        verbs: VerbsSettings {
            allowed: false,
            devices: Some("=mlx5_0:1".parse().unwrap()),
            gid_index: Some(3),
            pairs_per_peer: 4,
            mtu: Some(1024),
            timeout: 20,
            retries: 6,
            traffic_class: 106,
            service_level: 5,
        },
        tls: TlsSettings::default(),
    };
    assert_eq!(settings, Ok(expected));
}

#[test]
fn malformed_values_are_errors_that_name_variable_value_and_what_is_accepted() {
    for (variable, value, accepted) in [
        ("UNISUM_TIMEOUT", "0", "0.001 to 1000000 seconds"),
        ("UNISUM_TIMEOUT", "NaN", "seconds"),
        ("UNISUM_TIMEOUT", "inf", "seconds"),
        ("UNISUM_TIMEOUT", "5s", "seconds"),
        ("UNISUM_CONNECT_TIMEOUT", "-1", "seconds"),
        ("UNISUM_RECONNECT_TIMEOUT", "-0.1", "0, or 0.001 to 1000000 seconds"),
        ("UNISUM_RECONNECT_TIMEOUT", "0.0001", "0, or 0.001 to 1000000 seconds"),
        ("UNISUM_RECONNECT_TIMEOUT", "NaN", "seconds"),
        ("UNISUM_ALGORITHM", "ring tree", "name of an algorithm"),
        ("UNISUM_TRANSPORT", "ib", "auto, tcp, shm or verbs"),
        ("UNISUM_INTERFACE", "^", "such as eth,ib or =eth0 or ^docker: a name is empty"),
        ("NCCL_SOCKET_IFNAME", "eth0,", "a name is empty"),
        ("GLOO_SOCKET_IFNAME", "a b", "interface filter"),
        ("UNISUM_PORT_RANGE", "9-8", "LOW-HIGH or PORT, 1 to 65535: the low end is above"),
        ("UNISUM_REPLAY_PROCESS", "one", "the number of a process"),
        ("UNISUM_TCP_SOCKETS", "17", "1 to 16"),
        ("UNISUM_SLICE_BYTES", "1K", "4096 to 1073741824 bytes"),
        ("UNISUM_WINDOW", "0", "1 to 1024"),
        ("UNISUM_SHM_HEAP", "lots", "bytes"),
        ("UNISUM_CMA", "2", "1 or 0"),
        ("UNISUM_VERBS_PAIRS", "0", "1 to 16"),
        ("UNISUM_VERBS_TIMEOUT", "0", "1 to 31"),
    ] {
        let error = read(&[(variable, value)]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{variable}=`{value}`: expected ")), "{error}");
        assert!(error.contains(accepted), "{error}");
        // One sentence, not another within it.
        let value = format!("`{value}`");
        assert_eq!((error.matches(&value).count(), error.matches("expected").count()), (1, 1));
    }
}

/// What is no text is replaced by one character, whatever it was.
#[test]
fn what_is_no_text_is_refused_by_name() {
    for variable in ["UNISUM_JOB", "UNISUM_TLS_CERT", "UNISUM_RENDEZVOUS", "UNISUM_TOKEN_FILE"] {
        let error = read(&[(variable, "a\u{fffd}b")]).unwrap_err().to_string();
        assert_eq!(error, format!("{variable}=`a\u{fffd}b`: expected UTF-8"));
    }
    assert!(read(&[("UNISUM_TOKEN", "\u{fffd}")]).is_ok(), "who reads it says so");
}

#[test]
fn interfaces_fall_back_to_what_nccl_and_gloo_were_told() {
    let all = [("UNISUM_INTERFACE", "a"), ("NCCL_SOCKET_IFNAME", "b"), ("GLOO_SOCKET_IFNAME", "c")];
    let filter = |pairs| read(pairs).unwrap().interface.unwrap().to_string();
    assert_eq!([filter(&all), filter(&all[1..]), filter(&all[2..])], ["a", "b", "=c"]);
}

#[test]
fn malformed_devices_are_errors() {
    if !builtin::built().contains(&"verbs") {
        return;
    }
    let error = read(&[("UNISUM_VERBS_DEVICE", "mlx5_0:0")]).unwrap_err().to_string();
    assert!(error.contains("UNISUM_VERBS_DEVICE") && error.contains("1 to 255"), "{error}");
}

#[test]
fn rdma_settings_fall_back_to_what_nccl_was_told() {
    let of = |pairs| read(pairs).unwrap().verbs;
    let nccl = [("NCCL_IB_HCA", "=mlx5_1"), ("NCCL_IB_GID_INDEX", "3"), ("NCCL_IB_DISABLE", "1")];
    let expected = VerbsSettings {
        allowed: false,
        devices: Some("=mlx5_1".parse().unwrap()),
        gid_index: Some(3),
        ..VerbsSettings::default()
    };
    assert_eq!(of(&nccl), expected);
    let own = [nccl[1], nccl[2], ("UNISUM_VERBS_GID_INDEX", "1"), ("UNISUM_VERBS", "1")];
    assert_eq!((of(&own).gid_index, of(&own).allowed), (Some(1), true));
}

#[test]
fn misspelt_variables_are_listed() {
    let environment = Environment::from_iter([
        ("UNISUM_TIMEOUTS", "1"),
        ("UNISUM_TIMEOUT", "1"),
        ("UNISUM", "1"),
        ("UNISUM_LOG", "debug"),
        ("OTHER", "1"),
    ]);
    assert_eq!(unknown_variables(&environment), ["UNISUM_TIMEOUTS"]);
}

/// RDMA is not encrypted: with certificates it is refused, unless the fabric is isolated.
#[cfg(all(feature = "tls", feature = "verbs"))]
#[test]
fn certificates_refuse_rdma_unless_nobody_else_is_on_the_fabric() {
    let files = [
        ("UNISUM_TLS", "mtls"),
        ("UNISUM_TLS_CERT", "tls.crt"),
        ("UNISUM_TLS_KEY", "tls.key"),
        ("UNISUM_TLS_CA", "ca.crt"),
    ];
    let refused = |more: &[(&'static str, &'static str)]| {
        let settings = read(&[&files[..], more].concat()).unwrap();
        settings.tls.refuses_rdma()
    };
    assert!(refused(&[]).unwrap().contains("UNISUM_VERBS_ISOLATED=1"));
    assert!(refused(&[("UNISUM_VERBS_ISOLATED", "0")]).is_some());
    assert_eq!(refused(&[("UNISUM_VERBS_ISOLATED", "1")]), None);
    for level in ["auto", "token", "off"] {
        assert_eq!(read(&[("UNISUM_TLS", level)]).unwrap().tls.refuses_rdma(), None, "{level}");
    }
}
