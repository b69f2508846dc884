//! Primary contexts. Others are not supported.

use super::{Out, entry_points};
use crate::driver::codes::Code;
use crate::driver::device::{
    current, current_context, current_or_failed, of_context, pop_current, push_current, set_current,
};
use crate::driver::driver;

/// Streams have three priorities: 0 is the least, −2 the greatest.
pub(super) const GREATEST_PRIORITY: i32 = -2;

use std::sync::atomic::Ordering;

entry_points! {
    fn cuDevicePrimaryCtxRetain(context: Out<u64>, device: i32) {
        context.put(driver()?.device(device)?.retain())
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        driver()?.device(device)?.release()
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) {
        // Relaxed: only ever read back.
        driver()?.device(device)?.flags.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, is_active: Out<i32>) {
        let device = driver()?.device(device)?;
        // Relaxed: only ever read back.
        flags.put_if_wanted(device.flags.load(Ordering::Relaxed));
        is_active.put_if_wanted(i32::from(device.is_active()));
        Ok(())
    }

    fn cuCtxSetCurrent(context: u64) {
        driver()?;
        set_current(context)
    }

    fn cuCtxGetCurrent(context: Out<u64>) {
        driver()?;
        context.put(current_context())
    }

    fn cuCtxPushCurrent_v2(context: u64) {
        driver()?;
        push_current(context)
    }

    fn cuCtxPopCurrent_v2(context: Out<u64>) {
        driver()?;
        let popped = pop_current()?;
        context.put_if_wanted(popped);
        Ok(())
    }

    fn cuCtxGetDevice(device: Out<i32>) {
        let ordinal = current_or_failed()?.ordinal;
        device.put(i32::try_from(ordinal).unwrap_or(i32::MAX))
    }

    fn cuCtxGetFlags(flags: Out<u32>) {
        // Relaxed: only ever read back.
        flags.put(current_or_failed()?.flags.load(Ordering::Relaxed))
    }

    fn cuCtxSetFlags(flags: u32) {
        // Relaxed: only ever read back.
        current_or_failed()?.flags.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetApiVersion(_context: u64, version: Out<u32>) {
        version.put(3020)
    }

    fn cuCtxSynchronize() {
        current()?.synchronize(driver()?)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        current()?;
        least.put_if_wanted(0);
        greatest.put_if_wanted(GREATEST_PRIORITY);
        Ok(())
    }

    fn cuCtxGetLimit(value: Out<usize>, _limit: i32) {
        current()?;
        value.put(1 << 20)
    }

    fn cuCtxSetLimit(_limit: i32, _value: usize) {
        current().map(|_| ())
    }

    fn cuCtxGetCacheConfig(config: Out<i32>) {
        current()?;
        config.put(0)
    }

    fn cuCtxSetCacheConfig(_config: i32) {
        current().map(|_| ())
    }

    fn cuCtxEnablePeerAccess(peer: u64, flags: u32) {
        let (device, peer) = (current()?, of_context(peer)?);
        if flags != 0 || device.ordinal == peer.ordinal {
            return Err(Code::INVALID_VALUE);
        }
        if !driver()?.settings.are_peers(device.physical, peer.physical) {
            return Err(Code::PEER_ACCESS_UNSUPPORTED);
        }
        match device.peers.enable(peer.ordinal) {
            true => Err(Code::PEER_ACCESS_ALREADY_ENABLED),
            false => Ok(()),
        }
    }

    fn cuCtxDisablePeerAccess(peer: u64) {
        match current()?.peers.disable(of_context(peer)?.ordinal) {
            true => Ok(()),
            false => Err(Code::PEER_ACCESS_NOT_ENABLED),
        }
    }
}
