//! The emulated driver: what it shows of a program that uses it.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod devices;
mod faults;
mod library;
mod mapped;
mod memory;
mod multicast;
mod order;
mod processes;
#[path = "../support/mod.rs"]
mod support;

/// Kernels of these tests. `copy` moves `count` words, one thread each; `spin` waits until a word
/// is at least a value; `store` stores one.
const KERNELS: &str = "
.version 8.1
.target sm_70
.address_size 64

.visible .entry copy(.param .u64 to, .param .u64 from, .param .u32 count) {
    .reg .b64 %rd<6>;
    .reg .b32 %r<6>;
    .reg .pred %p;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    ld.param.u32 %r0, [count];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %p, %r4, %r0;
    @%p bra DONE;
    mul.wide.u32 %rd2, %r4, 4;
    add.s64 %rd3, %rd1, %rd2;
    add.s64 %rd4, %rd0, %rd2;
    ld.global.u32 %r5, [%rd3];
    st.global.u32 [%rd4], %r5;
DONE:
    ret;
}

.visible .entry spin(.param .u64 word, .param .u32 value) {
    .reg .b64 %rd;
    .reg .b32 %r<3>;
    .reg .pred %p;
    ld.param.u64 %rd, [word];
    ld.param.u32 %r0, [value];
AGAIN:
    ld.acquire.sys.global.u32 %r1, [%rd];
    sub.s32 %r2, %r1, %r0;
    setp.lt.s32 %p, %r2, 0;
    @%p bra AGAIN;
    ret;
}

.visible .entry store(.param .u64 word, .param .u32 value) {
    .reg .b64 %rd;
    .reg .b32 %r;
    ld.param.u64 %rd, [word];
    ld.param.u32 %r, [value];
    st.release.sys.global.u32 [%rd], %r;
    ret;
}

// The blocks pass a word on: each waits for the one after it.
.visible .entry relay(.param .u64 words) {
    .reg .b64 %rd<3>;
    .reg .b32 %r<4>;
    .reg .pred %p;
    ld.param.u64 %rd0, [words];
    mov.u32 %r0, %ctaid.x;
    mul.wide.u32 %rd1, %r0, 4;
    add.s64 %rd2, %rd0, %rd1;
    mov.u32 %r1, %nctaid.x;
    sub.u32 %r1, %r1, 1;
    setp.eq.u32 %p, %r0, %r1;
    @%p bra LAST;
AGAIN:
    ld.volatile.global.u32 %r2, [%rd2+4];
    setp.eq.u32 %p, %r2, 0;
    @%p bra AGAIN;
LAST:
    st.volatile.global.u32 [%rd2], 1;
    ret;
}

.visible .entry fail(.param .u64 word) {
    trap;
}
";
