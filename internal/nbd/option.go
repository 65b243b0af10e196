package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"drc/internal/block"
)

// negotiate greets the client and answers its options until it has chosen an
// export: then c.dev and c.terms are set, and release is the export's. It fails
// with errLeft if the client leaves in order.
func (c *conn) negotiate(ctx context.Context) (release func(), err error) {
	greeting := make([]byte, 0, greetingBytes)
	greeting = binary.BigEndian.AppendUint64(greeting, magicServer)
	greeting = binary.BigEndian.AppendUint64(greeting, magicOption)
	greeting = binary.BigEndian.AppendUint16(greeting, handshakeFixedNewstyle|handshakeNoZeroes)
	if _, err := c.nc.Write(greeting); err != nil {
		return nil, leftEarly(err)
	}
	p, err := c.in.next(4)
	if err != nil {
		return nil, leftEarly(err)
	}
	flags := binary.BigEndian.Uint32(p)
	if odd := flags &^ (clientFixedNewstyle | clientNoZeroes); odd != 0 {
		return nil, violationf("the client sent unknown flags %#x; it is no NBD client or a newer one", odd)
	}
	c.noZeroes = flags&clientNoZeroes != 0
	n := negotiation{conn: c, fixed: flags&clientFixedNewstyle != 0}
	for {
		release, done, err := n.step(ctx)
		if err != nil || done {
			return release, err
		}
	}
}

// leftEarly makes a client that hangs up where it may into errLeft.
func leftEarly(err error) error {
	if errors.Is(err, io.EOF) {
		return errLeft
	}
	return fmt.Errorf("negotiate: %w", err)
}

// negotiation is the option haggling of one connection.
type negotiation struct {
	*conn
	fixed bool   // the client knows replies to options
	data  []byte // of the option at hand, reused
	out   []byte // replies to the option at hand, reused
}

// step reads and answers one option. done means that the transmission phase
// begins.
func (n *negotiation) step(ctx context.Context) (release func(), done bool, err error) {
	h, err := n.in.next(optionHeaderBytes)
	if err != nil {
		return nil, false, leftEarly(err)
	}
	if magic := binary.BigEndian.Uint64(h); magic != magicOption {
		return nil, false, violationf("the client is out of step: an option begins with %#016x", magic)
	}
	opt := binary.BigEndian.Uint32(h[8:])
	length := binary.BigEndian.Uint32(h[12:])
	n.out = n.out[:0]
	if uint64(length) > uint64(n.server.limits.OptionBytes) {
		if n.fixed && opt != optExportName {
			n.fail(opt, repErrTooBig, "the option is too long")
			_ = n.send() // the connection ends in any case
		}
		return nil, false, violationf("option %d of %d bytes, the limit is %d", opt, length, n.server.limits.OptionBytes)
	}
	if cap(n.data) < int(length) {
		n.data = make([]byte, length)
	}
	n.data = n.data[:length]
	if err := n.in.full(n.data); err != nil {
		return nil, false, fmt.Errorf("negotiate: read option %d: %w", opt, err)
	}

	if opt == optExportName {
		release, err := n.exportName(ctx)
		return release, err == nil, err
	}
	if !n.fixed {
		return nil, false, violationf("option %d from a client that did not agree to fixed newstyle", opt)
	}
	switch opt {
	case optAbort:
		n.reply(opt, repAck, nil)
		_ = n.send() // the client need not wait for it
		return nil, false, errLeft
	case optList:
		n.list()
	case optInfo, optGo:
		release, done = n.infoOrGo(ctx, opt)
	case optStructuredReply:
		if len(n.data) != 0 {
			n.fail(opt, repErrInvalid, "this option takes no data")
			break
		}
		n.structured = true
		n.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		n.metaContext(ctx, opt)
	case optStartTLS:
		n.fail(opt, repErrUnsup, "this server has no TLS")
	default:
		n.fail(opt, repErrUnsup, "unknown option")
	}
	if err := n.send(); err != nil {
		if release != nil {
			release()
		}
		return nil, false, fmt.Errorf("negotiate: answer option %d: %w", opt, err)
	}
	return release, done, nil
}

func (n *negotiation) send() error {
	_, err := n.nc.Write(n.out)
	return err
}

// reply appends a reply to the option at hand.
func (n *negotiation) reply(opt, kind uint32, payload []byte) {
	n.out = binary.BigEndian.AppendUint64(n.out, magicReply)
	n.out = binary.BigEndian.AppendUint32(n.out, opt)
	n.out = binary.BigEndian.AppendUint32(n.out, kind)
	n.out = binary.BigEndian.AppendUint32(n.out, uint32(len(payload)))
	n.out = append(n.out, payload...)
}

func (n *negotiation) fail(opt, kind uint32, message string) {
	if len(message) > messageBytesMax {
		message = strings.ToValidUTF8(message[:messageBytesMax], "")
	}
	n.reply(opt, kind, []byte(message))
}

func (n *negotiation) list() {
	if len(n.data) != 0 {
		n.fail(optList, repErrInvalid, "this option takes no data")
		return
	}
	for _, e := range n.server.exports.List() {
		p := appendString(nil, e.Name)
		p = append(p, e.Description...)
		n.reply(optList, repServer, p)
	}
	n.reply(optList, repAck, nil)
}

// exportName answers EXPORT_NAME, which knows no error but hanging up.
func (n *negotiation) exportName(ctx context.Context) (release func(), err error) {
	name := string(n.data)
	if err := checkName(name); err != nil {
		return nil, err
	}
	o, err := n.open(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("open export %q: %w", name, err)
	}
	n.begin(o)
	n.out = binary.BigEndian.AppendUint64(n.out, uint64(o.geometry.SizeBytes))
	n.out = binary.BigEndian.AppendUint16(n.out, n.transmissionFlags(o.geometry))
	if !n.noZeroes {
		n.out = append(n.out, make([]byte, exportZeroesBytes)...)
	}
	if err := n.send(); err != nil {
		o.release()
		return nil, fmt.Errorf("negotiate: %w", err)
	}
	return o.release, nil
}

// infoOrGo answers INFO and GO, which differ only in what comes after.
func (n *negotiation) infoOrGo(ctx context.Context, opt uint32) (release func(), done bool) {
	name, wanted, err := parseInfo(n.data)
	if err != nil {
		n.fail(opt, repErrInvalid, err.Error())
		return nil, false
	}
	o, err := n.open(ctx, name)
	if err != nil {
		n.refuse(opt, name, err)
		return nil, false
	}

	var p []byte
	p = binary.BigEndian.AppendUint16(p, infoExport)
	p = binary.BigEndian.AppendUint64(p, uint64(o.geometry.SizeBytes))
	p = binary.BigEndian.AppendUint16(p, n.transmissionFlags(o.geometry))
	n.reply(opt, repInfo, p)

	p = binary.BigEndian.AppendUint16(p[:0], infoBlockSize)
	p = binary.BigEndian.AppendUint32(p, uint32(o.geometry.SectorSize))
	p = binary.BigEndian.AppendUint32(p, uint32(max(o.geometry.SectorSize, preferredBlockBytes)))
	p = binary.BigEndian.AppendUint32(p, requestBytesMax)
	n.reply(opt, repInfo, p)

	if wanted[infoName] {
		p = binary.BigEndian.AppendUint16(p[:0], infoName)
		n.reply(opt, repInfo, append(p, o.name...))
	}
	if wanted[infoDescription] && o.description != "" {
		p = binary.BigEndian.AppendUint16(p[:0], infoDescription)
		n.reply(opt, repInfo, append(p, o.description...))
	}
	n.reply(opt, repAck, nil)
	if opt == optInfo {
		o.release()
		return nil, false
	}
	n.begin(o)
	return o.release, true
}

// parseInfo decodes the data of INFO and GO.
func parseInfo(p []byte) (name string, wanted map[uint16]bool, err error) {
	name, p, err = cutString(p)
	if err != nil {
		return "", nil, err
	}
	if err := checkName(name); err != nil {
		return "", nil, err
	}
	if len(p) < 2 {
		return "", nil, errors.New("the option ends too early")
	}
	count := int(binary.BigEndian.Uint16(p))
	p = p[2:]
	if len(p) != 2*count {
		return "", nil, errors.New("the option's length does not fit its content")
	}
	wanted = make(map[uint16]bool)
	for ; len(p) > 0; p = p[2:] {
		switch kind := binary.BigEndian.Uint16(p); kind {
		case infoName, infoDescription:
			wanted[kind] = true
		}
	}
	return name, wanted, nil
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (n *negotiation) metaContext(ctx context.Context, opt uint32) {
	if opt == optSetMetaContext {
		n.metaChosen = false // whatever comes, the former choice is gone
	}
	if !n.structured {
		n.fail(opt, repErrInvalid, "structured replies must be agreed on first")
		return
	}
	name, queries, err := parseMetaContext(n.data)
	if err != nil {
		n.fail(opt, repErrInvalid, err.Error())
		return
	}
	e, listed := n.resolve(name)
	if !listed {
		o, err := n.open(ctx, name)
		if err != nil {
			n.refuse(opt, name, err)
			return
		}
		o.release()
	}
	match := opt == optListMetaContext && len(queries) == 0
	for _, q := range queries {
		match = match || q == contextAllocation || opt == optListMetaContext && q == "base:"
	}
	if match {
		var id uint32 // LIST leaves it zero
		if opt == optSetMetaContext {
			id = contextAllocationID
			n.metaChosen, n.metaExport = true, e.Name
		}
		p := binary.BigEndian.AppendUint32(nil, id)
		n.reply(opt, repMetaContext, append(p, contextAllocation...))
	}
	n.reply(opt, repAck, nil)
}

func parseMetaContext(p []byte) (name string, queries []string, err error) {
	name, p, err = cutString(p)
	if err != nil {
		return "", nil, err
	}
	if err := checkName(name); err != nil {
		return "", nil, err
	}
	if len(p) < 4 {
		return "", nil, errors.New("the option ends too early")
	}
	count := binary.BigEndian.Uint32(p)
	p = p[4:]
	// Each query takes at least its four bytes of length, so the data bounds
	// the loop, whatever count says.
	for ; count > 0; count-- {
		var q string
		if q, p, err = cutString(p); err != nil {
			return "", nil, err
		}
		queries = append(queries, q)
	}
	if len(p) != 0 {
		return "", nil, errors.New("the option's length does not fit its content")
	}
	return name, queries, nil
}

// opened is an export that was opened for this connection.
type opened struct {
	name        string
	description string
	dev         block.Device
	geometry    block.Geometry
	release     func() // never nil
}

// resolve finds an export by the name that a client uses. The empty name is the
// only export, if there is exactly one and none is called so. What is not in the
// list may be there all the same: Open knows.
func (n *negotiation) resolve(name string) (e Export, listed bool) {
	list := n.server.exports.List()
	for _, e := range list {
		if e.Name == name {
			return e, true
		}
	}
	if name == "" && len(list) == 1 {
		return list[0], true
	}
	return Export{Name: name}, false
}

func (n *negotiation) open(ctx context.Context, name string) (*opened, error) {
	e, _ := n.resolve(name)
	dev, release, err := n.server.exports.Open(ctx, e.Name)
	if err != nil {
		return nil, err
	}
	if release == nil {
		release = func() {}
	}
	return &opened{name: e.Name, description: e.Description, dev: dev, geometry: dev.Geometry(), release: release}, nil
}

// refuse tells the client why an export could not be opened.
func (n *negotiation) refuse(opt uint32, name string, err error) {
	kind := repErrPolicy
	switch {
	case errors.Is(err, ErrUnknownExport):
		kind = repErrUnknown
	case errors.Is(err, block.ErrStopping):
		kind = repErrShutdown
	}
	n.server.log.Info("nbd: export refused", "remote", n.remote, "export", name, "err", err)
	n.fail(opt, kind, fmt.Sprintf("export %q: %v", name, err))
}

// begin fixes what was agreed on for the transmission phase.
func (n *negotiation) begin(o *opened) {
	c := n.conn
	c.dev = o.dev
	c.share = c.server.share(o.name)
	c.terms = terms{
		geometry:   o.geometry,
		structured: c.structured,
		allocation: c.metaChosen && c.metaExport == o.name,
	}
	c.exportName.Store(&o.name)
}

func (n *negotiation) transmissionFlags(g block.Geometry) uint16 {
	flags := flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes |
		flagCanMultiConn | flagSendCache | flagSendFastZero
	if g.ReadOnly {
		flags |= flagReadOnly
	}
	if n.structured {
		flags |= flagSendDF
	}
	return flags
}

func checkName(name string) error {
	switch {
	case len(name) > nameBytesMax:
		return violationf("an export name of %d bytes, the maximum is %d", len(name), nameBytesMax)
	case !utf8.ValidString(name) || strings.ContainsRune(name, 0):
		return violationf("the export name %q is no text", name)
	}
	return nil
}

// appendString appends s with its length before it.
func appendString(p []byte, s string) []byte {
	p = binary.BigEndian.AppendUint32(p, uint32(len(s)))
	return append(p, s...)
}

// cutString takes such a string off the front of p.
func cutString(p []byte) (s string, rest []byte, err error) {
	if len(p) < 4 {
		return "", nil, errors.New("the option ends too early")
	}
	n := binary.BigEndian.Uint32(p)
	if uint64(n) > uint64(len(p)-4) {
		return "", nil, errors.New("a string is longer than the option it is in")
	}
	return string(p[4 : 4+n]), p[4+n:], nil
}
