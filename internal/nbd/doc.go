// Package nbd serves block devices over the NBD protocol, and speaks it as a
// client.
//
// A Server takes the volumes of an Exports and answers any number of
// connections to each of them: fixed newstyle negotiation, simple and
// structured replies, and every command of the baseline protocol plus TRIM,
// WRITE_ZEROES, CACHE and BLOCK_STATUS with base:allocation. There is no TLS:
// Listen opens unix sockets and loopback addresses only.
//
// What it promises: a request is answered once, and only after the device has
// answered it; a success is never sent for anything the device did not confirm.
// FLUSH covers what was answered on every connection to that export, which is
// why it advertises CAN_MULTI_CONN. After DISC and at shutdown, requests in
// flight are finished and answered; after a lost connection nothing is sent.
//
// What it never does: allocate in proportion to a length that it has not
// checked, reorder or split a device request, keep data of its own, or retry.
// Memory, requests in flight and connections are bounded by Limits.
//
// The protocol is the NBD project's doc/proto.md.
package nbd
