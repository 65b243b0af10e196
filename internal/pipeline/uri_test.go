package pipeline

import "testing"

func TestExportURI_EscapesWhatIsNotPlain(t *testing.T) {
	for _, c := range []struct{ listen, export, want string }{
		{"unix:/var/lib/drc/nbd.sock", "data", "nbd+unix:///data?socket=/var/lib/drc/nbd.sock"},
		{"unix:/my state+1/a&b#c%", "x/y z?", "nbd+unix:///x%2Fy%20z%3F?socket=/my%20state%2B1/a%26b%23c%25"},
		{"tcp:127.0.0.1:10809", "größe", "nbd://127.0.0.1:10809/gr%C3%B6%C3%9Fe"},
	} {
		if got := ExportURI(c.listen, c.export); got != c.want {
			t.Errorf("the URI of %q on %q is %s, not %s", c.export, c.listen, got, c.want)
		}
	}
}
