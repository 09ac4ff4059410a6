package main

import (
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// metrics parses Prometheus's text format as its Go programs do, and prints
// the name, the type and the number of samples of each family.
func metrics(text io.Reader) error {
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(text)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(families)) {
		family := families[name]
		if family.GetHelp() == "" {
			return fmt.Errorf("%s: no help", name)
		}
		fmt.Println(name, family.GetType(), len(family.GetMetric()))
	}
	return nil
}
