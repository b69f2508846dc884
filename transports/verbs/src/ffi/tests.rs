//! The layouts here against a C compiler's view of the installed `infiniband/verbs.h`.
//!
//! Where there is no compiler or header the test says so and passes, unless UNISUM_TEST_RDMA is
//! `required`.

use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::process::Command;

use super::*;

/// Sizes and offsets, each as a C expression and as it is here.
fn layouts() -> Vec<(String, usize)> {
    [sizes(), offsets()].concat()
}

fn sizes() -> Vec<(String, usize)> {
    let mut all = Vec::new();
    macro_rules! whole {
        ($($c:literal = $ours:ty),* $(,)?) => {
            $(all.push((format!("sizeof(struct {})", $c), size_of::<$ours>()));)*
        };
    }
    whole! {
        "ibv_context_ops" = Operations,
        "ibv_device_attr" = DeviceAttributes,
        "ibv_port_attr" = PortAttributes,
        "ibv_qp_cap" = QpCapabilities,
        "ibv_qp_init_attr" = QpInit,
        "ibv_global_route" = GlobalRoute,
        "ibv_ah_attr" = AddressHandle,
        "ibv_qp_attr" = QpAttributes,
        "ibv_sge" = Gather,
        "ibv_send_wr" = SendRequest,
        "ibv_recv_wr" = ReceiveRequest,
        "ibv_wc" = Completion,
        "ibv_async_event" = AsyncEvent,
    }
    all
}

fn offsets() -> Vec<(String, usize)> {
    let mut all = Vec::new();
    macro_rules! fields {
        ($($c:literal = $ours:ty { $($field:ident as $theirs:literal),* $(,)? })*) => {
            $($(all.push((
                format!("offsetof(struct {}, {})", $c, $theirs),
                offset_of!($ours, $field),
            ));)*)*
        };
    }
    fields! {
        "ibv_context" = Context {
            ops as "ops", cmd_fd as "cmd_fd", async_fd as "async_fd",
        }
        "ibv_context_ops" = Operations {
            poll_cq as "poll_cq", req_notify_cq as "req_notify_cq",
            post_send as "post_send", post_recv as "post_recv",
        }
        "ibv_comp_channel" = Channel { fd as "fd" }
        "ibv_cq" = Cq { context as "context" }
        "ibv_mr" = Mr { lkey as "lkey", rkey as "rkey" }
        "ibv_qp" = Qp { context as "context", qp_num as "qp_num" }
        "ibv_device_attr" = DeviceAttributes {
            max_qp_wr as "max_qp_wr", max_cqe as "max_cqe", max_pkeys as "max_pkeys",
            phys_port_cnt as "phys_port_cnt",
        }
        "ibv_port_attr" = PortAttributes {
            active_mtu as "active_mtu", lid as "lid", link_layer as "link_layer",
            port_cap_flags2 as "port_cap_flags2",
        }
        "ibv_qp_init_attr" = QpInit {
            send_cq as "send_cq", cap as "cap", qp_type as "qp_type", sq_sig_all as "sq_sig_all",
        }
        "ibv_ah_attr" = AddressHandle {
            dlid as "dlid", sl as "sl", is_global as "is_global", port_num as "port_num",
        }
        "ibv_global_route" = GlobalRoute {
            dgid as "dgid", sgid_index as "sgid_index", traffic_class as "traffic_class",
        }
        "ibv_qp_attr" = QpAttributes {
            path_mtu as "path_mtu", rq_psn as "rq_psn", sq_psn as "sq_psn",
            dest_qp_num as "dest_qp_num", qp_access_flags as "qp_access_flags",
            ah_attr as "ah_attr", min_rnr_timer as "min_rnr_timer", port_num as "port_num",
            timeout as "timeout", retry_cnt as "retry_cnt", rnr_retry as "rnr_retry",
            rate_limit as "rate_limit",
        }
        "ibv_send_wr" = SendRequest {
            sg_list as "sg_list", opcode as "opcode", send_flags as "send_flags",
            imm_data as "imm_data", remote_addr as "wr.rdma.remote_addr", rkey as "wr.rdma.rkey",
        }
        "ibv_wc" = Completion {
            status as "status", opcode as "opcode", byte_len as "byte_len",
            imm_data as "imm_data", qp_num as "qp_num", dlid_path_bits as "dlid_path_bits",
        }
        "ibv_async_event" = AsyncEvent { event_type as "event_type" }
    }
    all
}

/// Constants, each by its C name and as it is here.
fn constants() -> Vec<(&'static str, i64)> {
    macro_rules! constants {
        ($($c:literal = $ours:expr),* $(,)?) => { vec![$(($c, i64::from($ours))),*] };
    }
    constants! {
        "IBV_LINK_LAYER_ETHERNET" = LINK_LAYER_ETHERNET,
        "IBV_QPT_RC" = QPT_RC, "IBV_QPS_INIT" = QPS_INIT, "IBV_QPS_RTR" = QPS_RTR,
        "IBV_QPS_RTS" = QPS_RTS, "IBV_QPS_ERR" = QPS_ERR, "IBV_QP_STATE" = QP_STATE,
        "IBV_QP_ACCESS_FLAGS" = QP_ACCESS_FLAGS, "IBV_QP_PKEY_INDEX" = QP_PKEY_INDEX,
        "IBV_QP_PORT" = QP_PORT, "IBV_QP_AV" = QP_AV, "IBV_QP_PATH_MTU" = QP_PATH_MTU,
        "IBV_QP_TIMEOUT" = QP_TIMEOUT, "IBV_QP_RETRY_CNT" = QP_RETRY_CNT,
        "IBV_QP_RNR_RETRY" = QP_RNR_RETRY, "IBV_QP_RQ_PSN" = QP_RQ_PSN,
        "IBV_QP_MAX_QP_RD_ATOMIC" = QP_MAX_QP_RD_ATOMIC,
        "IBV_QP_MIN_RNR_TIMER" = QP_MIN_RNR_TIMER, "IBV_QP_SQ_PSN" = QP_SQ_PSN,
        "IBV_QP_MAX_DEST_RD_ATOMIC" = QP_MAX_DEST_RD_ATOMIC, "IBV_QP_DEST_QPN" = QP_DEST_QPN,
        "IBV_ACCESS_LOCAL_WRITE" = ACCESS_LOCAL_WRITE,
        "IBV_ACCESS_REMOTE_WRITE" = ACCESS_REMOTE_WRITE, "IBV_WR_RDMA_WRITE" = WR_RDMA_WRITE,
        "IBV_WR_RDMA_WRITE_WITH_IMM" = WR_RDMA_WRITE_WITH_IMM,
        "IBV_SEND_SIGNALED" = SEND_SIGNALED, "IBV_SEND_SOLICITED" = SEND_SOLICITED,
        "IBV_SEND_INLINE" = SEND_INLINE, "IBV_WC_SUCCESS" = WC_SUCCESS,
        "IBV_WC_WR_FLUSH_ERR" = WC_FLUSHED,
        "IBV_WC_RECV_RDMA_WITH_IMM" = WC_RECV_RDMA_WITH_IMM,
        "IBV_EVENT_QP_FATAL" = EVENT_QP_FATAL, "IBV_EVENT_QP_REQ_ERR" = EVENT_QP_REQ_ERR,
        "IBV_EVENT_QP_ACCESS_ERR" = EVENT_QP_ACCESS_ERR,
        "IBV_EVENT_DEVICE_FATAL" = EVENT_DEVICE_FATAL, "IBV_EVENT_PORT_ACTIVE" = EVENT_PORT_ACTIVE,
        "IBV_EVENT_PORT_ERR" = EVENT_PORT_ERR,
    }
}

#[test]
fn layouts_and_constants_are_those_of_the_header() {
    let required = std::env::var("UNISUM_TEST_RDMA").is_ok_and(|word| word == "required");
    let directory = std::env::temp_dir().join(format!("unisum-layout-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (source, object) = (directory.join("layout.c"), directory.join("layout.o"));
    let mut text = String::from("#include <stddef.h>\n#include <infiniband/verbs.h>\n");
    for (number, (expression, ours)) in layouts().iter().enumerate() {
        writeln!(text, "int l{number}[({expression}) == {ours} ? 1 : -1]; // {expression}")
            .unwrap();
    }
    for (number, (name, ours)) in constants().iter().enumerate() {
        writeln!(text, "int c{number}[({name}) == {ours} ? 1 : -1]; // {name}").unwrap();
    }
    std::fs::write(&source, text).unwrap();
    let compiled = Command::new("cc").arg("-c").arg(&source).arg("-o").arg(&object).output();
    std::fs::remove_dir_all(&directory).unwrap();
    let (is_fine, said) = match compiled {
        Ok(output) => {
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        }
        Err(error) => (false, format!("cc: fatal error: {error}")),
    };
    if !required && said.contains("fatal error") {
        println!("skipped: no C compiler with infiniband/verbs.h");
        return;
    }
    assert!(is_fine, "{said}");
}
