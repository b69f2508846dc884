//! The layouts and constants here against a C compiler's view of the installed `pmix.h`.
//!
//! Where there is no compiler or header the test says so and passes, unless UNISUM_TEST_PMIX is
//! `required`.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::process::Command;

use super::*;

/// Sizes, offsets and constants, each as a C expression and as it is here.
fn numbers() -> Vec<(&'static str, i64)> {
    let sizes = [
        ("sizeof(pmix_proc_t)", size_of::<Process>()),
        ("offsetof(pmix_proc_t, rank)", offset_of!(Process, rank)),
        ("sizeof(pmix_byte_object_t)", size_of::<Bytes>()),
        ("offsetof(pmix_byte_object_t, size)", offset_of!(Bytes, size)),
        ("sizeof(pmix_value_t)", size_of::<Value>()),
        ("offsetof(pmix_value_t, data)", offset_of!(Value, data)),
        ("sizeof(((pmix_value_t *)0)->type)", size_of::<u16>()),
        ("sizeof(pmix_info_t)", size_of::<Info>()),
        ("offsetof(pmix_info_t, flags)", offset_of!(Info, flags)),
        ("offsetof(pmix_info_t, value)", offset_of!(Info, value)),
        ("sizeof(pmix_info_directives_t)", size_of::<u32>()),
        ("sizeof(pmix_scope_t)", size_of::<u8>()),
        ("sizeof(pmix_status_t)", size_of::<c_int>()),
        ("sizeof(pmix_rank_t)", size_of::<u32>()),
    ];
    let constants = [
        ("(PMIX_RANK_WILDCARD)", i64::from(RANK_WILDCARD)),
        ("PMIX_BOOL", BOOL.into()),
        ("PMIX_INT", INT.into()),
        ("PMIX_UINT16", UINT16.into()),
        ("PMIX_UINT32", UINT32.into()),
        ("PMIX_BYTE_OBJECT", BYTE_OBJECT.into()),
        ("PMIX_GLOBAL", SCOPE_GLOBAL.into()),
        ("PMIX_SUCCESS", SUCCESS.into()),
        ("PMIX_ERR_TIMEOUT", TIMED_OUT.into()),
        ("PMIX_ERR_UNREACH", UNREACHABLE.into()),
        ("PMIX_ERR_COMM_FAILURE", COMMUNICATION_FAILED.into()),
        ("PMIX_ERR_LOST_CONNECTION", LOST_CONNECTION.into()),
    ];
    let sizes = sizes.map(|(name, size)| (name, i64::try_from(size).unwrap()));
    [&sizes[..], &constants].concat()
}

const KEYS: [(&str, &CStr); 5] = [
    ("PMIX_JOB_SIZE", JOB_SIZE),
    ("PMIX_LOCAL_SIZE", LOCAL_SIZE),
    ("PMIX_LOCAL_RANK", LOCAL_RANK),
    ("PMIX_TIMEOUT", TIMEOUT),
    ("PMIX_COLLECT_DATA", COLLECT_DATA),
];

#[test]
fn layouts_and_constants_are_those_of_the_header() {
    let mut program = String::from("#include <stddef.h>\n#include <string.h>\n#include <pmix.h>\n");
    for (c, ours) in numbers() {
        writeln!(program, "_Static_assert((long long)({c}) == {ours}LL, \"{c}\");").unwrap();
    }
    for (c, ours) in KEYS {
        let ours = ours.to_str().unwrap();
        writeln!(program, "_Static_assert(sizeof({c}) == sizeof(\"{ours}\"), \"{c}\");").unwrap();
        writeln!(program, "_Static_assert(__builtin_strcmp({c}, \"{ours}\") == 0, \"{c}\");")
            .unwrap();
    }
    // As the functions are called here; a pointer of another type is an error.
    program.push_str(
        "pmix_status_t (*init)(pmix_proc_t *, pmix_info_t *, size_t) = PMIx_Init;\n\
         int (*initialized)(void) = PMIx_Initialized;\n\
         pmix_status_t (*finalize)(const pmix_info_t *, size_t) = PMIx_Finalize;\n\
         pmix_status_t (*put)(pmix_scope_t, const char *, pmix_value_t *) = PMIx_Put;\n\
         pmix_status_t (*commit)(void) = PMIx_Commit;\n\
         pmix_status_t (*fence)(const pmix_proc_t *, size_t, const pmix_info_t *, size_t) = \
         PMIx_Fence;\n\
         pmix_status_t (*get)(const pmix_proc_t *, const char *, const pmix_info_t *, size_t, \
         pmix_value_t **) = PMIx_Get;\n\
         const char *(*error_string)(pmix_status_t) = PMIx_Error_string;\n\
         const char *(*version)(void) = PMIx_Get_version;\n",
    );
    let folder = crate::launcher::tests::Scratch::new();
    let path = folder.path().join("layout.c");
    std::fs::write(&path, program).unwrap();
    let debian = format!("/usr/lib/{}-linux-gnu/pmix2/include", std::env::consts::ARCH);
    let compile = |source: &std::path::Path| {
        let flags = ["-fsyntax-only", "-Werror=incompatible-pointer-types", "-I", debian.as_str()];
        Command::new("cc").args(flags).arg(source).output()
    };
    let probe = folder.path().join("probe.c");
    std::fs::write(&probe, "#include <pmix.h>\n").unwrap();
    if !compile(&probe).is_ok_and(|output| output.status.success()) {
        let required = std::env::var("UNISUM_TEST_PMIX").is_ok_and(|it| it == "required");
        assert!(!required, "no C compiler, or no pmix.h (Debian: libpmix-dev)");
        println!("not checked: no C compiler, or no pmix.h");
        return;
    }
    let output = compile(&path).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_version_is_found_in_what_the_library_says() {
    for (version, expected) in [
        ("OpenPMIx 4.2.2 (PMIx Standard: 4.1, Stable ABI: 0.0, Provisional ABI: 0.0)", Some(4)),
        ("OpenPMIx 3.2.5, repo rev: v3.2.5", Some(3)),
        ("PMIx 2.2.5", Some(2)),
        ("11.0", Some(11)),
        ("", None),
        ("none", None),
    ] {
        assert_eq!(major(version), expected, "{version}");
    }
}

#[test]
fn an_operation_has_at_least_a_second() {
    for (timeout, expected) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (u64::MAX, c_int::MAX)] {
        let option = seconds(Duration::from_millis(timeout));
        assert_eq!(option.value.kind, INT);
        // SAFETY: the kind says which field was written.
        assert_eq!(unsafe { option.value.data.integer }, expected, "{timeout} ms");
    }
}
