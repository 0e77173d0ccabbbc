"""What docs/reliability.md promises, row by row, and the tests that prove each row.

    pytest -m "" --reliability-table docs/reliability.md     runs these tests and writes the table into the page

A test is named FILE::FUNCTION (without `tests/test_` and `test_`); all its parameters count. `test_structure.py` fails
when a name here stands for no test.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One promise."""

    part: str
    text: str
    tests: tuple[str, ...]


def _rows(part: str, **rows: tuple[str, str]) -> dict[str, Row]:
    return {name: Row(part, text, tuple(tests.split())) for name, (text, tests) in rows.items()}


ROWS = {
    **_rows(
        "Ground rules",
        G01=(
            "messages: one line of what, then case, field, file, expected, found, fix; codes; no traceback; all "
            "problems collected, 20 on the screen",
            "cli::exit_codes cli::debug_shows_the_traceback cli::an_error_is_json_when_json_was_asked_for "
            "checking::every_kind_of_problem_is_told_at_once_with_its_case "
            "reliability::twenty_problems_on_the_screen_and_all_in_check_json volumes::errors_survive_pickling",
        ),
        G02=(
            "exit codes 0 to 5, 130, 143; the same in status.json",
            "cli::exit_codes cli::usage_errors_end_with_2_and_tell_what_is_right "
            "run::the_state_is_readable_at_any_time "
            "training::interrupted_after_any_iteration_it_goes_on_bit_for_bit "
            "main_job::a_missing_prediction_is_counted_and_ends_with_4",
        ),
        G03=(
            "one atomic writer: whole or not at all, synced, mode from umask, nothing left behind",
            "files::content_and_mode_follow_the_umask files::any_exception_leaves_the_old_file_and_nothing_else "
            "files::a_failure_at_each_step_is_all_or_nothing "
            "files::the_content_is_synced_before_it_gets_its_name_and_the_folder_after "
            "files::property_an_exception_at_any_byte_changes_nothing files::torchs_own_report_of_a_full_disk",
        ),
        G04=(
            "one verified reader of NIfTI: length and checksum of every file",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "volumes::plain_packed_and_several_members_give_the_same volumes_fuzz::a_mutated_file_is_read_or_refused",
        ),
        G05=(
            "checkpoints: last, previous, best, SHA-256 of each; the new one whole before the old is touched",
            "checkpoint::last_previous_and_best_are_kept checkpoint::any_flipped_bit_is_noticed "
            "checkpoint::torch_itself_would_load_the_flipped_file "
            "checkpoint::a_disk_that_changes_what_is_written_leaves_the_old_one "
            "checkpoint::without_hard_links_the_previous_one_is_a_copy",
        ),
        G06=(
            "random numbers are a function of seed, epoch and sample",
            "sampling::a_plan_depends_on_seed_and_epoch_alone engine::dropout_follows_from_the_seed_alone "
            "batches::a_stream_begun_later_gives_what_was_left",
        ),
        G07=(
            "signals: saved after the current iteration; a second one leaves at once",
            "handlers::signals_are_noted_for_the_block_alone training::a_second_signal_leaves_at_once "
            "training::interrupted_during_validation_it_validates_when_resumed",
        ),
        G08=(
            "cache keys are content, transform and versions; a NaN score is the worst; nothing to resume is an error",
            "cache::another_file_setting_fact_or_version_is_another_key "
            "cache::a_changed_file_of_equal_size_and_time_is_noticed engine::a_score_that_is_no_number_is_the_worst "
            "training::nothing_to_resume_is_an_error",
        ),
    ),
    **_rows(
        "Bad inputs",
        B01=(
            "NIfTI cut in half, shorter than its header, header only, vox_offset past the end: refused with bytes",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "reliability::predict_fails_every_bad_volume_and_finishes_the_good_one "
            "reliability::data_check_tells_every_bad_volume_with_its_case "
            "main_job::training_refuses_bad_data_naming_case_and_file",
        ),
        B02=(
            "one flipped byte in the gzip stream, wrong checksum, last 8 bytes missing: refused",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "reliability::predict_fails_every_bad_volume_and_finishes_the_good_one "
            "reliability::data_check_tells_every_bad_volume_with_its_case",
        ),
        B03=(
            "empty, text, an HTML page named .nii.gz: refused, saying what it starts with",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "prediction_refusals::the_bad_case_is_told_and_the_others_finish "
            "reliability::predict_fails_every_bad_volume_and_finishes_the_good_one",
        ),
        B04=(
            "wrong magic refused; big-endian read",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "volumes::types_and_byte_orders_are_read_to_the_value volumes::nifti_2",
        ),
        B05=(
            "dimension 0, negative, nine of them, 32767^3: refused before allocating",
            "volumes::huge_sizes_are_refused_before_anything_is_allocated "
            "reliability::predict_fails_every_bad_volume_and_finishes_the_good_one",
        ),
        B06=(
            "complex, RGB24, unknown data type: refused by name; RGB where the set says so",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code volumes::rgb_volume_where_the_set_says_so",
        ),
        B07=(
            "one NaN or inf: refused with count and first index; a policy can replace",
            "volumes::nan_policy_replaces_and_notes main_job::training_refuses_bad_data_naming_case_and_file "
            "reliability::data_check_tells_every_bad_volume_with_its_case",
        ),
        B08=(
            "all NaN refused; constant warned",
            "volumes::constant_image_is_read_and_noted checking::warnings_are_not_problems "
            "prediction_refusals::the_bad_case_is_told_and_the_others_finish",
        ),
        B09=(
            "pixdim 0, negative, NaN, spacing outside 0.001 to 100 mm: refused unless the sform is valid",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "volumes::affine_choice_and_fall_back_to_a_valid_sform",
        ),
        B10=(
            "sform NaN, singular or sheared; sform and qform that disagree: refused, naming both; a choice decides",
            "volumes::affine_choice_and_fall_back_to_a_valid_sform volumes_geometry::check_affine_names_what_is_wrong "
            "volumes_damaged::a_singular_affine_of_a_chosen_kind_names_the_other",
        ),
        B11=(
            "oblique affine: read; the output has the input's to 1e-5",
            "volumes_geometry::oblique_affines_are_read_and_kept_to_1e_5 "
            "inference_native::a_phantom_lands_within_half_a_voxel",
        ),
        B12=(
            "image and label that differ in shape, spacing, origin, direction or axis codes: refused",
            "reliability::a_bad_label_is_refused_by_check_and_train volumes_geometry::pairs "
            "evaluation::another_grid_is_refused_with_both_geometries evaluation::resampling_is_the_explicit_way_out",
        ),
        B13=(
            "mixed orientations: all 48 axis codes come back exactly",
            "volumes_geometry::every_orientation_round_trips_and_matches_nibabel "
            "volumes_geometry::labels_land_where_the_image_lies_in_every_orientation "
            "inference_native::all_48_orientations_come_back_exactly "
            "prediction_geometry::a_phantom_lands_where_it_belongs_in_every_orientation",
        ),
        B14=(
            "4-D NIfTI: trailing 1 squeezed, channels declared, time refused",
            "volumes::four_dimensions main_job::training_refuses_bad_data_naming_case_and_file",
        ),
        B15=(
            "volume smaller than the patch, single slice: padded and cropped back",
            "reliability::a_volume_smaller_than_the_patch_and_a_single_slice_are_padded_and_cropped_back "
            "reliability::training_on_volumes_smaller_than_the_patch "
            "batches::an_image_smaller_than_the_patch_stands_in_its_middle",
        ),
        B16=(
            "label negative, not in the list, undeclared 255, 0.5: refused with value and voxel count",
            "reliability::a_bad_label_is_refused_by_check_and_train "
            "volumes_labels::refused_label_values_name_value_and_count",
        ),
        B17=(
            "empty label warned; a class without a voxel in training refused",
            "reliability::an_empty_label_warns_and_a_class_that_no_case_shows_is_refused "
            "training::a_class_that_training_lacks_is_refused",
        ),
        B18=(
            "labels as int64, float64, bool, 1-bit, palette: exact",
            "volumes_labels::labels_of_any_type_are_exact volumes_labels::palette_and_one_bit_labels "
            "reliability::labels_of_any_type_pass_the_check",
        ),
        B19=(
            "grey, RGB, RGBA, 16-bit mixed in one set: refused with counts, or converted as documented",
            "checking::pictures_of_different_depth entry::mixed_kinds_are_refused_with_counts "
            "volumes_pictures::colour_alpha_and_conversions",
        ),
        B20=(
            "truncated PNG and TIFF, wrong suffix, 60000^2, decompression bombs: refused before allocating",
            "volumes::every_bad_image_of_the_corpus_is_refused_with_its_code "
            "volumes::huge_sizes_are_refused_before_anything_is_allocated "
            "volumes_pictures::directories_that_loop_and_tiles_that_are_huge_are_refused_at_once",
        ),
        B21=(
            "TIFF stack, float, BigTIFF: read rightly",
            "volumes_pictures::tiff_variants_and_windows volumes_pictures::tiff_stacks_are_volumes_with_pages_last",
        ),
        B22=(
            "DICOM: missing slice, several series, localizer, mixed orientation, changing spacing or size, tilt, no "
            "position, truncated pixels: refused, listed; a series can be chosen",
            "volumes_dicom::irregular_series_are_refused_with_a_list "
            "volumes_dicom::several_series_are_listed_and_one_is_chosen "
            "volumes_dicom::several_problems_are_told_at_once "
            "prediction_refusals::the_bad_case_is_told_and_the_others_finish",
        ),
        B23=(
            "dataset.json broken, incomplete, miscounted: exit 2 with the place; one image in two parts: a leak",
            "data::a_broken_dataset_json data::a_wrong_dataset_json_is_told_with_the_place "
            "data::leaks_by_path_link_and_group checking::an_image_in_two_parts "
            "reliability::the_same_image_twice_is_told_by_content",
        ),
        B24=(
            "missing file, folder or pipe in its place, dangling link, loop, no permission: refused",
            "reliability::what_stands_in_place_of_a_file_is_refused volumes_damaged::no_permission "
            "volumes::a_folder_in_place_of_a_file_and_an_unreadable_file",
        ),
        B25=(
            "names with spaces, accents, CJK, quotes, newline, %, leading -, 255 bytes, markup: work up to the report",
            "reliability::odd_names_from_check_to_report volumes_inputs::odd_names_work_everywhere "
            "files::safe_stem_gives_one_legal_name_and_never_the_same_for_two "
            "reliability::names_that_differ_in_case_alone_are_refused_where_they_would_collide",
        ),
        B26=(
            "zero, one, too few cases: exit 2 with the number needed",
            "reliability::zero_one_and_too_few_cases_tell_the_number_needed data::too_few_cases_tell_the_number_needed",
        ),
        B27=(
            "config: unknown and duplicate keys, 1e-3, tabs, tags, exploding aliases, patch and stride: exit 2, line "
            "and column, nearest key",
            "config::what_the_reader_refuses_with_line_and_column config::billion_laughs_is_refused_at_once "
            "config::each_fault_is_told_with_its_place config::scalars_follow_yaml_1_2 "
            "main_job::wrong_settings_are_told_before_any_data_is_opened",
        ),
        B28=(
            "any byte flipped, cut or doubled in 15 formats: read or refused, nothing else",
            "volumes_fuzz::a_mutated_file_is_read_or_refused",
        ),
    ),
    **_rows(
        "Faults",
        F01=(
            "kill -9 at random moments of training: continued in the same weights",
            "training::killed_at_random_moments_it_ends_in_the_same_weights",
        ),
        F02=(
            "kill -9 between write, sync, rename and prune: a whole checkpoint at every point",
            "checkpoint::stopped_at_any_point_a_whole_checkpoint_is_there "
            "files::kill_minus_nine_at_each_step_is_all_or_nothing_and_swept_up "
            "cache::stopped_at_any_point_there_is_no_half_case",
        ),
        F03=(
            "disk full at a checkpoint, a mask, the cache: the old one intact, exit 5; the cache costs speed alone",
            "checkpoint::a_full_disk_leaves_the_old_one volumes_write::a_full_disk_while_a_label_is_written "
            "files::a_full_disk_names_path_needed_and_free cache::a_full_disk_costs_speed_alone",
        ),
        F04=(
            "output folder read-only or not there: found before training starts, exit 5",
            "reliability::an_output_that_cannot_be_written_is_told_before_the_work "
            "run::a_folder_that_cannot_be_written_is_found_first",
        ),
        F05=(
            "last.pt truncated, flipped, empty, of another model: the previous one, said so; never from epoch 0",
            "checkpoint::a_damaged_last_falls_back_and_says_so "
            "training::a_damaged_last_checkpoint_costs_one_interval_and_is_told "
            "training::a_last_checkpoint_of_another_model_is_not_taken "
            "checkpoint::a_checkpoint_of_another_run_is_not_taken "
            "reliability::a_checkpoint_of_another_run_is_not_continued "
            "main_job::a_checkpoint_that_is_none",
        ),
        F06=(
            "SIGTERM, SIGINT: saved, 143 and 130, exact resume",
            "training::interrupted_after_any_iteration_it_goes_on_bit_for_bit "
            "training::interrupted_during_validation_it_validates_when_resumed",
        ),
        F07=(
            "a data worker killed, raising, hanging: the cases in flight named",
            "batches::a_lost_worker_is_named_with_its_cases batches::a_failing_augmentation_names_transform_and_cases",
        ),
        F08=(
            "one of two processes raises or is killed: all end, a checkpoint stays",
            "distributed::if_the_first_process_fails_the_other_ends_too "
            "distributed::a_process_that_is_gone_is_noticed_at_once "
            "distributed::a_lost_process_ends_all_and_the_run_can_be_continued",
        ),
        F09=(
            "NaN loss: stops after 5 steps, names the cases; a step without a finite gradient changes nothing",
            "training::a_loss_that_is_no_number_stops_and_names_the_cases "
            "engine::a_step_without_a_finite_gradient_changes_nothing_and_is_counted",
        ),
        F10=(
            "out of memory: prediction takes a smaller plan and keeps finished slabs; training tells numbers, exit 5",
            "inference_inferers::out_of_memory_gives_a_smaller_plan "
            "inference_inferers::out_of_memory_keeps_finished_slabs reliability::out_of_memory_while_training",
        ),
        F11=(
            "prediction killed and begun again, shards: no case twice, none lost, the same bytes",
            "prediction::killed_at_any_moment_and_continued_gives_the_same_bytes prediction::shards_do_every_case_once "
            "reliability::predicted_twice_or_into_another_folder_the_bytes_are_the_same",
        ),
        F12=(
            "two runs in one second, two processes on one cache, a clock that goes back",
            "run::two_runs_of_one_second_have_two_folders reliability::two_processes_fill_one_cache "
            "reliability::a_clock_that_goes_back_changes_nothing files::lock_excludes_a_second_process",
        ),
    ),
    **_rows(
        "Security",
        S01=(
            "checkpoints, bundles and packages cannot run code",
            "checkpoint::a_checkpoint_cannot_run_code export::a_bundles_pickle_cannot_run_code "
            "volumes_damaged::volumes_cross_processes export::damaged_and_foreign_packages_are_refused",
        ),
        S02=(
            "strict YAML, closed registries",
            "config::what_the_reader_refuses_with_line_and_column "
            "config::any_text_is_read_or_refused_never_anything_else",
        ),
        S03=(
            "archives: no absolute path, `..`, link, device, duplicate; counted size",
            "files_transfer::members_outside_the_folder_are_refused "
            "files_transfer::links_devices_duplicates_bombs_and_broken_archives_are_refused "
            "refusals::archives_whose_checksum_is_wrong_or_missing",
        ),
        S04=(
            "downloads: https, SHA-256, size limit, never under the final name until whole",
            "files_transfer::downloads_need_https_hash_and_size files_transfer::redirects_away_from_https_are_refused "
            "fetching::a_wrong_archive_leaves_nothing",
        ),
        S05=(
            "paths stay inside the data folder; outputs inside theirs; an input is never overwritten",
            "files::inside_stops_dots_links_and_absolute_paths reliability::a_link_out_of_the_data_folder_is_refused "
            "data::links_out_of_the_root_are_refused_unless_allowed reliability::an_input_is_never_overwritten "
            "prediction_refusals::files_of_others_are_never_replaced",
        ),
        S06=(
            "the report: everything escaped, a content security policy, no address; CSV cells quoted",
            "report::the_page_is_one_file_without_addresses_and_with_every_name_escaped "
            "report::the_policy_names_the_hash_of_the_only_script_and_style "
            "evaluation::cells_that_a_spreadsheet_would_run_are_quoted_and_come_back",
        ),
        S07=(
            "patient data reach no log, report, cache, checkpoint, mask or export; ids of series are keyed hashes",
            "privacy::no_patient_data_in_anything_that_is_written_or_said privacy::the_search_finds_what_is_hidden "
            "volumes_dicom::case_ids_are_keyed_hashes_that_do_not_depend_on_names "
            "report_privacy::reports_scores_and_exports_have_no_folder_and_no_patient",
        ),
        S08=("no library with known holes is allowed", "reliability::libraries_with_known_holes_are_excluded"),
    ),
    **_rows(
        "Properties",
        P01=(
            "orientation round trips; image and label stay together under every spatial transform; no new label",
            "volumes_geometry::property_world_positions_never_move "
            "transforms_warp::a_checkerboard_and_its_label_stay_aligned "
            "transforms_warp::no_new_label_appears_and_types_stay "
            "properties::every_spatial_transform_keeps_image_and_label_together",
        ),
        P02=(
            "an identity network through every inferer returns its input",
            "inference_inferers::identity_network_gives_the_input_back",
        ),
        P03=(
            "scores: invariant to flips and permuted axes, monotone under removal, equal to brute force",
            "properties::scores_do_not_see_flips_and_axis_order properties::removing_hits_never_raises_overlap "
            "properties::confusion_equals_brute_force metrics_surface::every_distance_equals_its_definition",
        ),
        P04=(
            "splits partition and never leak; tiles partition any image; plans draw no sample twice",
            "data::folds_partition_the_cases_and_never_split_a_group inference_tiling::tiles_partition_any_image "
            "batches::no_sample_twice_and_none_missing",
        ),
        P05=(
            "config round trip; the atomic writer under any exception",
            "config::what_is_written_reads_back_equal config::round_trips "
            "files::property_an_exception_at_any_byte_changes_nothing",
        ),
    ),
}  # fmt: skip


def node(test: str) -> tuple[str, str]:
    """(file, function) of a test named as above.

    >>> node("files::any_exception")
    ('test_files.py', 'test_any_exception')
    """
    file, function = test.split("::")
    return f"test_{file}.py", f"test_{function}"
