package pipeline_test

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestBoundaries holds the house's rules: stages do not import each other,
// mechanisms know no stage, and only one package talks S3.
func TestBoundaries(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	stages := []string{"drc/capture", "drc/vbuf", "drc/segmenter", "drc/uploader", "drc/restorer"}
	d := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
	for d.More() {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		if slices.Contains(stages, p.ImportPath) {
			seen++
		}
		for _, i := range p.Imports {
			stage := slices.Contains(stages, i)
			mechanism := strings.HasPrefix(p.ImportPath, "drc/internal/") && p.ImportPath != "drc/internal/pipeline"
			switch {
			case stage && slices.Contains(stages, p.ImportPath):
				t.Errorf("stage %s imports stage %s", p.ImportPath, i)
			case stage && mechanism:
				t.Errorf("mechanism %s imports stage %s", p.ImportPath, i)
			case i == "drc/internal/pipeline" && !strings.HasPrefix(p.ImportPath, "drc/cmd/"):
				t.Errorf("%s imports the pipeline", p.ImportPath)
			case strings.HasPrefix(i, "github.com/minio/minio-go") && p.ImportPath != "drc/internal/object/s3" && p.ImportPath != "drc/internal/realpart":
				t.Errorf("%s talks S3 by itself", p.ImportPath)
			}
		}
	}
	if seen != len(stages) {
		t.Errorf("saw %d of %d stages: the test looks in the wrong place", seen, len(stages))
	}
}
