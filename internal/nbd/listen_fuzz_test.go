package nbd

import "testing"

func FuzzCheckListen(f *testing.F) {
	for _, s := range []string{"", "unix:/s", "unix:", "unix:rel", "tcp:127.0.0.1:10809", "tcp:[::1]:0", "tcp:host", "tcp::", "tcp:1.2.3.4:99999", "vsock:1", "unix:/\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, uri string) { _ = CheckListen(uri) })
}
