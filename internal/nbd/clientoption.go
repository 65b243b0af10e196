package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"drc/internal/block"
)

// negotiate is the client's side of the option haggling, up to GO.
func (c *Client) negotiate(export string) error {
	h, err := c.in.next(greetingBytes)
	if err != nil {
		return fmt.Errorf("read the server's greeting: %w", err)
	}
	if binary.BigEndian.Uint64(h) != magicServer || binary.BigEndian.Uint64(h[8:]) != magicOption {
		return errors.New("this is no NBD server, or one of the old style")
	}
	server := binary.BigEndian.Uint16(h[16:])
	if server&handshakeFixedNewstyle == 0 {
		return errors.New("the NBD server does not know fixed newstyle negotiation")
	}
	flags := clientFixedNewstyle
	if server&handshakeNoZeroes != 0 {
		flags |= clientNoZeroes
	}
	if _, err := c.nc.Write(binary.BigEndian.AppendUint32(nil, flags)); err != nil {
		return err
	}

	err = c.option(optStructuredReply, nil, nil)
	c.structured = err == nil
	if err != nil && !errors.Is(err, errRefused) {
		return err
	}
	if c.structured {
		p := appendString(nil, export)
		p = binary.BigEndian.AppendUint32(p, 1)
		p = appendString(p, contextAllocation)
		err := c.option(optSetMetaContext, p, func(kind uint32, p []byte) error {
			if kind == repMetaContext && len(p) >= 4 && string(p[4:]) == contextAllocation {
				c.allocation, c.hasContext = binary.BigEndian.Uint32(p), true
			}
			return nil
		})
		if err != nil && !errors.Is(err, errRefused) {
			return err
		}
	}

	p := appendString(nil, export)
	p = binary.BigEndian.AppendUint16(p, 1)
	p = binary.BigEndian.AppendUint16(p, infoBlockSize)
	told := false
	c.geometry.SectorSize = 512
	err = c.option(optGo, p, func(kind uint32, p []byte) error {
		if kind != repInfo || len(p) < 2 {
			return nil
		}
		switch info, p := binary.BigEndian.Uint16(p), p[2:]; {
		case info == infoExport && len(p) == 10:
			told = true
			c.geometry.SizeBytes = int64(binary.BigEndian.Uint64(p))
			c.flags = binary.BigEndian.Uint16(p[8:])
		case info == infoBlockSize && len(p) == 12:
			c.geometry.SectorSize = max(512, int(binary.BigEndian.Uint32(p)))
			c.max = min(c.max, int64(binary.BigEndian.Uint32(p[8:])))
		}
		return nil
	})
	if err != nil {
		return err
	}
	return c.accept(told)
}

// accept checks what the server told about the export.
func (c *Client) accept(told bool) error {
	g := &c.geometry
	g.ReadOnly = c.flags&flagReadOnly != 0
	switch {
	case !told || c.flags&flagHasFlags == 0 || g.SizeBytes < 0:
		return violationf("the server did not describe the export")
	case g.SectorSize != 512 && g.SectorSize != 4096:
		return fmt.Errorf("the export's least block size is %d bytes: %w", g.SectorSize, block.ErrUnsupported)
	case g.SizeBytes%int64(g.SectorSize) != 0:
		return fmt.Errorf("the export has %d bytes, which is no multiple of its sector size %d: %w", g.SizeBytes, g.SectorSize, block.ErrUnsupported)
	case c.max < int64(g.SectorSize):
		return violationf("the export's maximum block size %d is below its least", c.max)
	}
	c.max -= c.max % int64(g.SectorSize)
	return nil
}

// errRefused: the server answered an option with an error.
var errRefused = errors.New("the server refused")

// option sends an option and reads replies until the final one.
func (c *Client) option(opt uint32, data []byte, each func(kind uint32, p []byte) error) error {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = appendString(p, string(data))
	if _, err := c.nc.Write(p); err != nil {
		return err
	}
	for {
		h, err := c.in.next(replyHeaderBytes)
		if err != nil {
			return unexpected(err)
		}
		got, kind, length := binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h) != magicReply || got != opt || length > 64<<10 {
			return violationf("the server's answer to option %d makes no sense", opt)
		}
		p, err := c.in.next(int(length))
		if err != nil {
			return unexpected(err)
		}
		switch {
		case kind == repErrUnknown:
			return fmt.Errorf("%w: %w", errRefused, ErrUnknownExport)
		case kind&repErrorBit != 0:
			return fmt.Errorf("%w option %d with %#x: %s", errRefused, opt, kind, p)
		case kind == repAck:
			return nil
		}
		if each != nil {
			if err := each(kind, p); err != nil {
				return err
			}
		}
	}
}
